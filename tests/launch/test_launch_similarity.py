"""`basestone similarity`: what it hands to its worker."""

from __future__ import annotations


def test_options_reach_the_worker(basestone, asked):
    words = ("similarity", "model", "pairs.jsonl")
    assert basestone(*words).code == 7
    assert basestone(*words, "--batch", "4", "--json", "--debug").code == 7
    plain = [*words, "--batch", "32"]
    assert [call[:2] for call in asked] == [(plain, 1), ([*words, "--batch", "4", "--json", "--debug"], 1)]


def test_a_batch_of_nothing_is_refused(basestone):
    done = basestone("similarity", "model", "pairs.jsonl", "--batch", "0")
    assert done.code == 64 and "--batch" in done.err
