"""Files of a checkpoint as they are read: what is damaged, missing, planted or edited is found."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_files import BLOCK_BYTES, FILES, payload, problem, read_range, reseal, save

from basestone.trainer.checkpoint import places
from basestone.trainer.checkpoint.format import PICKLE_SUFFIXES
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


# ---- reading ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(step):
    reader = Reader(step)
    assert reader.verify() == []
    assert reader.state() == {"step": 1}
    assert reader.num_bytes == sum(path.stat().st_size for path in step.iterdir())
    rank = reader.index.ranks[1]
    assert rank.blocks == [
        hashlib.sha256(payload(1)[start : start + BLOCK_BYTES]).hexdigest()
        for start in range(0, 150, BLOCK_BYTES)
    ]
    assert reader.index.ranks[0].blocks == []


@pytest.fixture(scope="module")
def shared_step(tmp_path_factory: pytest.TempPathFactory, small_blocks: None) -> Path:
    return save(tmp_path_factory.mktemp("shared"))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_reads_as_written(shared_step, data):
    start = data.draw(st.integers(0, 150))
    num_bytes = data.draw(st.integers(0, 150 - start))
    assert (
        read_range(Reader(shared_step), "rank_00001.bin", start, num_bytes)
        == payload(1)[start : start + num_bytes]
    )


@pytest.mark.parametrize(
    ("name", "start", "num_bytes"), [("rank_00001.bin", 149, 2), ("rank_00002.bin", 128, 1)]
)
def test_a_range_behind_the_end_is_refused(step, name, start, num_bytes):
    with pytest.raises(CheckpointError, match=name):
        read_range(Reader(step), name, start, num_bytes)


# ---- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "keep", [lambda n: 0, lambda n: 1, lambda n: n // 2, lambda n: n - 1], ids=["0", "1", "half", "-1"]
)
def test_truncated(step, name, keep):
    os.truncate(step / name, keep((step / name).stat().st_size))
    assert name in problem(step)


@pytest.mark.faults
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_bit_flip_found(shared_step, data):
    path = shared_step / data.draw(st.sampled_from(FILES))
    good = path.read_bytes()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bad)
        assert problem(shared_step) != ""
    finally:
        path.write_bytes(good)
    assert problem(shared_step) == ""


@pytest.mark.faults
def test_zero_page_found(step):
    data = bytearray(payload(1))
    data[64:128] = bytes(64)
    (step / "rank_00001.bin").write_bytes(data)
    assert problem(step) == f"{step / 'rank_00001.bin'}: bytes 64..128 do not match their sha256"


@pytest.mark.faults
@pytest.mark.parametrize("name", [*FILES, "rank_00000.bin"])
def test_missing_file(step, name):
    (step / name).unlink()
    if name == "MANIFEST.json":
        assert problem(step).startswith(f"{step}: no MANIFEST.json; the save never finished")
    else:
        assert problem(step) == f"{step}: {name} is missing"


@pytest.mark.faults
def test_extra_file(step):
    (step / "notes.txt").write_text("mine")
    (step / "more").mkdir()
    assert problem(step).splitlines() == [
        f"{step / name}: is not of this checkpoint: MANIFEST.json does not name it"
        for name in ("more", "notes.txt")
    ]
    assert read_range(Reader(step), "rank_00001.bin", 0, 150) == payload(1), "what is ours is still read"


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such checkpoint directory"):
        Reader(tmp_path / "nowhere")


@pytest.mark.faults
def test_mixed_attempts(tmp_path, step):
    other = save(tmp_path / "other", step=2)
    shutil.copy(other / "state.json", step / "state.json")
    assert problem(step) == f"{step / 'state.json'}: its sha256 differs from the manifest's"


@pytest.mark.parametrize("name", ["rank_00001.bin", "index.json", "state.json"])
@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_what_is_no_regular_file_is_refused_unopened(tmp_path, step, name, kind):
    path = step / name
    path.rename(tmp_path / "real")
    if kind == "symlink":
        path.symlink_to(tmp_path / "real")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert problem(step) == f"{path}: is not a regular file"


@pytest.mark.parametrize("call", ["open", "lstat", "iterdir"])
def test_storage_that_fails_while_reading_is_named(step, monkeypatch, call):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target = places if call == "open" else Path
    monkeypatch.setattr(target, call, fail, raising=False)
    text = problem(step)
    assert "cannot be read: Input/output error" in text and str(step) in text


# ---- what others may have planted ---------------------------------------------------------------------------------


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


@pytest.mark.faults
@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_planted_pickle(tmp_path, step, suffix):
    (step / f"x{suffix}").write_bytes(pickle.dumps(Canary(str(tmp_path / "canary"))))
    assert f"x{suffix} is not ours and may hold a pickle; refused unopened" in problem(step)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_under_our_names_is_never_executed(tmp_path, step, name):
    body = pickle.dumps(Canary(str(tmp_path / "canary")))
    (step / name).write_bytes(body)
    if name.endswith(".bin"):
        index = json.loads((step / "index.json").read_text())
        hashes = [
            hashlib.sha256(body[at : at + BLOCK_BYTES]).hexdigest() for at in range(0, len(body), BLOCK_BYTES)
        ]
        index["ranks"][int(name[5:10])].update(bytes=len(body), blocks=hashes)
        (step / "index.json").write_text(json.dumps(index))
    if name != "MANIFEST.json":
        reseal(step)
    if name.endswith(".bin"):
        assert read_range(Reader(step), name, 0, len(body)) == body, "to us it is numbers"
    else:
        assert f"{step / name}: is damaged" in problem(step)
    assert not (tmp_path / "canary").exists()


class Watch:
    """Hears of every file that this process opens."""

    def __init__(self) -> None:
        self.names: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.names is not None:
            self.names.append(str(arguments[0]))

    def problem(self, path: Path) -> tuple[str, list[str]]:
        """What is wrong with a directory, and what was opened to find out."""
        names = self.names = []
        try:
            return problem(path), names
        finally:
            self.names = None


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()  # a hook stays for the life of the process


def first_rank(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["ranks"][1].update(values)


HOSTILE_INDEX: dict[str, Callable[[dict[str, Any]], object]] = {
    "path out of the directory": first_rank(file="../secret"),
    "absolute path": first_rank(file="/etc/passwd"),
    "no such rank file": first_rank(file="rank_00009.bin"),
    "the manifest as a rank file": first_rank(file="MANIFEST.json"),
    "a rank file twice": lambda index: index["ranks"].append(index["ranks"][1]),
    "a rank file left out": lambda index: index["ranks"].pop(),
    "no rank files": lambda index: index.update(ranks=[]),
    "other size": first_rank(bytes=149),
    "absurd size": first_rank(bytes=1 << 70),
    "negative size": first_rank(bytes=-1),
    "a size that is no integer": first_rank(bytes=150.5),
    "a hash missing": lambda index: index["ranks"][1]["blocks"].pop(),
    "a hash too many": lambda index: index["ranks"][1]["blocks"].append("0" * 64),
    "hashes that are numbers": first_rank(blocks=[1, 2, 3]),
    "no layout": lambda index: index["ranks"][1].pop("tp_size"),
    "an impossible layout": first_rank(tp_size=0),
    "negative fragment": first_rank(fragments=[[0, -1, 4, 0]]),
    "empty fragment": first_rank(fragments=[[0, 0, 0, 0]]),
    "short fragment": first_rank(fragments=[[0, 0]]),
    "fragments that are no list": first_rank(fragments="all"),
    "negative parameter": first_rank(fragments=[[-1, 0, 4, 0]]),
    "negative shape": lambda index: index["parameters"][0].update(shape=[-4, -3]),
    "shape of text": lambda index: index["parameters"][0].update(shape="43"),
    "a parameter without a name": lambda index: index["parameters"][0].pop("name"),
    "no parameters": lambda index: index.pop("parameters"),
    "no tensors": lambda index: index.pop("tensors"),
    "tensors that are numbers": lambda index: index.update(tensors=[1]),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", HOSTILE_INDEX)
def test_hostile_index(step, watch, kind):
    (step.parent / "secret").write_bytes(payload(1))
    index = json.loads((step / "index.json").read_text())
    HOSTILE_INDEX[kind](index)
    (step / "index.json").write_text(json.dumps(index))
    assert "sha256" in problem(step) or "bytes" in problem(step), "an edit alone is found by the manifest"
    reseal(step)
    text, opened = watch.problem(step)
    assert str(step) in text
    assert opened and all(Path(name).parent == step or Path(name) == step for name in opened), opened


BODIES = {
    "empty": b"",
    "text": b"hello",
    "a list": b"[]",
    "a number": b"0",
    "nested too deep": b"[" * 100_000,
    "a number too long": b'{"a": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("name", ["index.json", "state.json", "MANIFEST.json"])
def test_a_file_that_is_no_object_is_refused(step, name, body):
    (step / name).write_bytes(body)
    if name != "MANIFEST.json":
        reseal(step)
    assert f"{step / name}: is damaged" in problem(step)


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {name: value for name, value in manifest.items() if name != key}


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest = copy.deepcopy(manifest)
        manifest["files"][new] = manifest["files"].pop(old)
        return manifest

    return change


HOSTILE_MANIFEST: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no format": without("format"),
    "no files": without("files"),
    "no hashes": without("sha256"),
    "files as a list": lambda manifest: manifest | {"files": []},
    "files as text": lambda manifest: manifest | {"files": "ab"},
    "hashes as a list": lambda manifest: manifest | {"sha256": []},
    "hash as a number": lambda manifest: manifest | {"sha256": {"index.json": 0}},
    "hashes of nothing": lambda manifest: manifest | {"sha256": {}},
    "negative size": lambda manifest: manifest | {"files": manifest["files"] | {"rank_00001.bin": -1}},
    "path out of the directory": renamed("rank_00001.bin", "../secret"),
    "the directory itself": renamed("rank_00001.bin", "."),
    "the directory above": renamed("rank_00001.bin", ".."),
    "no index": renamed("index.json", "rank_00003.bin"),
    "index not announced": lambda manifest: (
        manifest | {"files": {"state.json": manifest["files"]["state.json"]}}
    ),
    "state not announced": lambda manifest: (
        manifest | {"files": {"index.json": manifest["files"]["index.json"]}}
    ),
    "a list": lambda manifest: [manifest],
    "a number": lambda manifest: 1,
}


@pytest.mark.parametrize("kind", HOSTILE_MANIFEST)
def test_an_edited_manifest_is_refused(step, watch, kind):
    (step.parent / "secret").write_bytes(payload(1))
    reseal(step, HOSTILE_MANIFEST[kind])
    text, opened = watch.problem(step)
    assert str(step) in text
    assert all(Path(name).parent == step or Path(name) == step for name in opened), opened


@pytest.mark.parametrize("name", ["../secret", "sub/secret", "ABSOLUTE"])
def test_manifest_and_index_that_both_point_elsewhere_are_refused(step, watch, name):
    (step / "sub").mkdir()
    for path in (step.parent / "secret", step / "sub" / "secret"):
        path.write_bytes(payload(1))
    name = name.replace("ABSOLUTE", str(step.parent / "secret"))
    index = json.loads((step / "index.json").read_text())
    index["ranks"][1]["file"] = name
    (step / "index.json").write_text(json.dumps(index))
    reseal(step, renamed("rank_00001.bin", name))
    text, opened = watch.problem(step)
    assert text == f"{step}: {name} is missing"
    assert all(Path(name).parent == step or Path(name) == step for name in opened), opened


def test_threads_may_share_a_reader(step, monkeypatch):
    """More blocks than the reader keeps, asked for in as many orders as there are threads."""
    monkeypatch.setattr("basestone.trainer.checkpoint.reader.CACHED_BLOCKS", 1)
    reader, places = Reader(step), [(rank, at) for rank in (1, 2) for at in range(0, 128, 8)]

    def read_all(seed: int) -> None:
        for rank, at in random.Random(seed).sample(places * 20, k=20 * len(places)):
            assert read_range(reader, f"rank_{rank:05d}.bin", at, 8) == payload(rank)[at : at + 8]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # else a thread is hardly ever interrupted where it matters
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read_all, range(32)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.faults
@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_format_versions(step, version):
    reseal(step, lambda manifest: manifest | {"format": version})
    assert problem(step) == f"{step}: has format {version}, this release reads format 1"
