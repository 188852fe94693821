"""Readers killed at random points of a chain of topologies: not one sample is skipped, repeated or changed."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from streams import open_stream

from basestone.data.mixing import SourceSettings
from basestone.data.position import merge_states
from basestone.data.storage import write_atomic

pytestmark = pytest.mark.faults
LANES = 12
READERS = (1, 2, 3, 4, 6, 5)  # 5 divides nothing
WEIGHTS = ({"a": 0.6, "b": 0.4}, {"a": 0.1, "b": 0.9}, {"b": 0.5, "a": 0.5, "c": 0.3}, {"a": 1.0})
PHASE_SAMPLES = 40 * LANES  # each mix rules so many samples


def mix_of(attempt_sample: int) -> dict[str, float]:
    return WEIGHTS[attempt_sample // PHASE_SAMPLES % len(WEIGHTS)]


def open_all(
    shards: dict[str, Path], model: Path, sample: int, state: Any, readers: int, workers: int, packing: str
):
    sources = tuple(
        SourceSettings(name, (str(shards[name]),), weight) for name, weight in mix_of(sample).items()
    )
    return [
        open_stream(
            [],
            model,
            sources=sources,
            sequence_length=48,
            global_batch=LANES,
            seed=11,
            packing=packing,
            reader=reader,
            num_readers=readers,
            workers=workers,
            state=state,
        )
        for reader in range(readers)
    ]


def rows_of(streams: list) -> dict[int, list[int]]:
    return {
        int(sample): [int(source), *row.tolist()]
        for batch in [stream.next_batch() for stream in streams]
        for sample, source, row in zip(batch.ids, batch.sources, batch.tokens, strict=True)
        if sample >= 0
    }


def train(folder: Path, shards: dict[str, Path], model: Path, readers: int, workers: int, packing: str) -> None:
    """Be a run: take up the newest state, hand out samples, record each batch, save now and then."""
    saved = folder / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else None
    sample = state["position"] if state else 0
    streams = open_all(shards, model, sample, state, readers, workers, packing)
    log = os.open(folder / "samples.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, b"\n")  # ends a line that a kill left torn
    mix = mix_of(sample)
    while mix_of(sample) == mix:
        rows = rows_of(streams)
        os.write(log, json.dumps([sample, rows]).encode() + b"\n")
        sample += LANES
        if sample // LANES % 3 == 0 or mix_of(sample) != mix:
            write_atomic(saved, json.dumps(merge_states([stream.state() for stream in streams])).encode())
    os._exit(0)  # the mix changes: the next start takes it


def position_of(folder: Path) -> int:
    saved = folder / "state.json"
    return json.loads(saved.read_text())["position"] if saved.exists() else 0


def uninterrupted(shards: dict[str, Path], model: Path, count: int, packing: str) -> list[dict[int, list[int]]]:
    """The same run by one reader that is never killed; only changes of the mix restart it."""
    batches: list[dict[int, list[int]]] = []
    state, streams = None, []
    for sample in range(0, count, LANES):
        if sample % PHASE_SAMPLES == 0:
            streams = open_all(shards, model, sample, state, 1, 0, packing)
        batches.append(rows_of(streams))
        state = streams[0].state()
    return batches


@pytest.mark.parametrize(
    ("kills", "packing"),
    [(8, "split"), (6, "best_fit"), pytest.param(100, "split", marks=pytest.mark.slow)],
)
def test_a_run_killed_again_and_again_is_the_uninterrupted_run(
    kills: int, packing: str, text_shards: Path, token_shards: Path, model: Path, tmp_path: Path
) -> None:
    shards = {"a": text_shards / "train", "b": token_shards / "train", "c": text_shards / "heldout"}
    choose = random.Random(kills)
    killed, topologies, lines = 0, set(), 0
    log = tmp_path / "samples.jsonl"
    while killed < kills or position_of(tmp_path) <= PHASE_SAMPLES:
        readers = choose.choice(READERS)
        workers = choose.choice((0, 0, 1, 2, 3) if readers < 4 else (0, 1))
        process = os.fork()
        if process == 0:
            try:
                train(tmp_path, shards, model, readers, workers, packing)
            finally:
                os._exit(1)
        wanted = lines + 1 + choose.randint(1, 12)
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                time.sleep(choose.random() * 0.01)
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
                killed += 1
                break
            time.sleep(0.002)
        topologies.add((readers, workers))
        lines = log.read_bytes().count(b"\n")
    recorded = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}]")]
    highest = max(sample for sample, _ in recorded)
    expected = uninterrupted(shards, model, highest + LANES, packing)
    seen = set()
    for sample, rows in recorded:
        want = expected[sample // LANES]
        assert {int(number): row for number, row in rows.items()} == want, f"samples from {sample}"
        seen.add(sample)
    assert seen == set(range(0, highest + LANES, LANES)), "no batch is missing"
    assert len(topologies) > min(4, kills // 2)
    assert highest > PHASE_SAMPLES, "the mix changed on the way"
