"""Runs fed by several sources, over a network that fails, past damage: what a user types, start to end."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import losses_of, steps_of
from servers import serving

pytestmark = pytest.mark.dist
ONE = ("run.processes=1", "parallel.tensor=1", "parallel.zero=0", "data.workers=0", "evaluate.every_steps=0")


def words(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def events_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def mixed(first, second, **more: str) -> list[str]:
    """Two sources of the corpus, packed whole, with attention that keeps to documents."""
    sources = f'{{ a = {{ path = "{first}", weight = 0.7 }}, b = {{ path = "{second}", weight = 0.3 }} }}'
    return [f"data.sources={sources}", 'data.packing="best_fit"', 'data.attention="document"', *more]


def test_a_mix_over_a_network_that_fails_trains_like_local_files(tmp_path, corpus, forked):
    shards = corpus / "shards"
    run = corpus / "run.toml"
    local = mixed(shards / "train", shards / "heldout")
    done = forked("train", run, "--run-dir", tmp_path / "local", *words(*ONE, "train.steps=6", *local))
    assert done.returncode == 0, done.stderr
    with serving(shards, fault_rate=0.3, faults=("status 500", "flip", "short")) as server:
        remote = mixed(f"{server.url}/train", f"{server.url}/heldout")
        changes = ("parallel.tensor=1", "parallel.zero=2", "evaluate.every_steps=0", "train.steps=6", *remote)
        cache = (f"reading.cache={tmp_path / 'cache'}", "reading.cache_gib=0.1")
        done = forked("train", run, "--run-dir", tmp_path / "remote", *words(*changes, *cache))
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "remote") == pytest.approx(losses_of(tmp_path / "local"), rel=1e-5)
    last = steps_of(tmp_path / "remote")[6]
    assert last["data_retries"] > 0 and last["data_bytes_read"] > 0 and last["data_bad_chunks"] == 0
    assert last["data_shares"] == steps_of(tmp_path / "local")[6]["data_shares"]
    assert last["data_shares"]["a"] == pytest.approx(0.7, abs=0.2) and sum(last["data_shares"].values()) == 1
    assert last["tokens"] < 6 * 8 * 64, "what is left of a sequence has no weight"

    # the weights change, and the first source has another name now: it is known by its content and goes on
    again = mixed(shards / "heldout", shards / "train")
    again[0] = again[0].replace("{ a =", "{ b =").replace(", b =", ", c =")
    done = forked("train", run, "--run-dir", tmp_path / "local", *words(*ONE, "train.steps=8", *again))
    assert done.returncode == 0, done.stderr
    assert not [event for event in events_of(tmp_path / "local") if event["event"] == "data"]
    shares = steps_of(tmp_path / "local")[8]["data_shares"]
    assert set(shares) == {"b", "c"} and shares["c"] * 64 >= last["data_shares"]["a"] * 48, (
        "counted on, not anew"
    )


def damage(shards, out) -> dict:
    """Copy shards and flip a bit in the middle of one chunk; say which."""
    shutil.copytree(shards, out)
    manifest = json.loads((out / "manifest.json").read_text())
    chunk = len(manifest["shards"][0]["chunks"]) // 2
    offset, length, _, _ = manifest["shards"][0]["chunks"][chunk]
    file = out / manifest["shards"][0]["file"]
    content = bytearray(file.read_bytes())
    content[offset + length // 2] ^= 1
    file.write_bytes(content)
    total = sum(row[1] for shard in manifest["shards"] for row in shard["chunks"])
    return {"chunk": chunk, "bytes": length, "fraction": length / total}


@pytest.mark.faults
def test_quarantine_passes_over_the_damaged_chunk_says_so_and_has_a_limit(tmp_path, corpus, forked):
    bad = damage(corpus / "shards" / "train", tmp_path / "damaged")
    run = corpus / "run.toml"
    changes = (
        f"data.train={tmp_path / 'damaged'}",
        "parallel.tensor=1",
        "train.steps=80",
        "evaluate.every_steps=0",
    )
    quarantine = ("reading.on_bad_chunk=quarantine", f"reading.max_bad_fraction={bad['fraction'] * 1.01}")

    done = forked("train", run, "--run-dir", tmp_path / "limit", *words(*changes, quarantine[0]))
    assert done.returncode == 76
    assert "more than reading.max_bad_fraction = 0.001; mend the shards" in done.stderr

    run_dir = tmp_path / "run"
    done = forked("train", run, "--run-dir", run_dir, *words(*changes, *quarantine, "data.workers=2"))
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert (line["source"], line["chunk"], line["bytes"]) == ("train", bad["chunk"], bad["bytes"])
    assert "checksum is" in line["problem"] and line["step"] >= 1
    assert f"passed over {bad['bytes']} bytes of train" in done.stderr
    last = steps_of(run_dir)[80]
    assert last["data_bad_chunks"] == 1 and last["data_bad_bytes"] == bad["bytes"]

    # nothing is counted twice, by whichever reader or attempt: one more such chunk would be too many
    done = forked("train", run, "--run-dir", run_dir, *words(*changes[:2], "train.steps=90", *quarantine))
    assert done.returncode == 0, done.stderr
    assert steps_of(run_dir)[90]["data_bad_chunks"] == 1
