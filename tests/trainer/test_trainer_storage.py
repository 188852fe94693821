"""Files of a checkpoint: what is damaged, missing, planted or edited is found; what is written is whole or absent."""

from __future__ import annotations

import builtins
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basestone.trainer import storage
from basestone.trainer.errors import CheckpointError
from basestone.trainer.storage import RankWriter, Reader, commit, remove, steps_in, write_file

BLOCK_BYTES = 64
RANK_BYTES = (0, 150, 128)  # nothing, a last block that is not full, whole blocks
FILES = ["MANIFEST.json", "index.json", "state.json", "rank_00001.bin", "rank_00002.bin"]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Make blocks small, so that small files have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BLOCK_BYTES", BLOCK_BYTES)
        yield


def payload(rank: int) -> bytes:
    return random.Random(rank).randbytes(RANK_BYTES[rank])


def write_ranks(temporary: Path) -> dict[str, Any]:
    """Write rank files into a new directory; give their index."""
    temporary.mkdir(parents=True)
    ranks = []
    for rank, size in enumerate(RANK_BYTES):
        with RankWriter(temporary / f"rank_{rank:05d}.bin") as writer:
            for start in range(0, size, 50):  # pieces that are no blocks
                writer.write(memoryview(payload(rank))[start : start + 50])
        ranks.append(
            {
                "file": writer.path.name,
                "bytes": writer.written,
                "tp_rank": 0,
                "tp_size": 1,
                "fragments": [[0, 0, 4, 0]],
                "blocks": writer.blocks,
            }
        )
    return {"parameters": [{"name": "w", "shape": [4, 3]}], "tensors": ["master"], "ranks": ranks}


def save(checkpoints: Path, step: int = 1) -> Path:
    temporary, final = checkpoints / ".tmp-step", checkpoints / f"step_{step:08d}"
    commit(temporary, final, write_ranks(temporary), {"step": step})
    return final


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


def problem(path: Path) -> str:
    """What is wrong with a directory, by its structure or by all its bytes; nothing where it is good."""
    try:
        return "\n".join(Reader(path).verify())
    except CheckpointError as error:
        return str(error)


def reseal(path: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Make sizes and hashes of the manifest fit what lies there, as someone who edits a checkpoint would."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = (path / name).stat().st_size
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    manifest = change(manifest) or manifest
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


# ---- reading ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(step):
    reader = Reader(step)
    assert reader.verify() == []
    assert reader.state() == {"step": 1}
    assert reader.num_bytes == sum(path.stat().st_size for path in step.iterdir() if path.name != "MANIFEST.json")
    rank = reader.index.ranks[1]
    assert rank.blocks == [
        hashlib.sha256(payload(1)[start : start + BLOCK_BYTES]).hexdigest() for start in range(0, 150, BLOCK_BYTES)
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
    assert Reader(shared_step).read("rank_00001.bin", start, num_bytes) == payload(1)[start : start + num_bytes]


@pytest.mark.parametrize(("name", "start", "num_bytes"), [("rank_00001.bin", 149, 2), ("rank_00002.bin", 128, 1)])
def test_a_range_behind_the_end_is_refused(step, name, start, num_bytes):
    with pytest.raises(CheckpointError, match=name):
        Reader(step).read(name, start, num_bytes)


# ---- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [lambda n: 0, lambda n: 1, lambda n: n // 2, lambda n: n - 1], ids="0 1 half -1".split())
def test_truncated(step, name, keep):
    os.truncate(step / name, keep((step / name).stat().st_size))
    assert name in problem(step)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_one_flipped_bit_anywhere(shared_step, data):
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


def test_a_zeroed_page_is_named_by_its_bytes(step):
    data = bytearray(payload(1))
    data[64:128] = bytes(64)
    (step / "rank_00001.bin").write_bytes(data)
    assert problem(step) == f"{step / 'rank_00001.bin'}: bytes 64..128 do not match their sha256"


@pytest.mark.parametrize("name", [*FILES, "rank_00000.bin"])
def test_missing_file(step, name):
    (step / name).unlink()
    assert name in problem(step)
    if name == "MANIFEST.json":
        assert "the save never finished" in problem(step)


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such checkpoint directory"):
        Reader(tmp_path / "nowhere")


def test_files_of_two_saves_mixed(tmp_path, step):
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


@pytest.mark.parametrize("call", ["open", "read_bytes", "lstat", "iterdir"])
def test_storage_that_fails_while_reading_is_named(step, monkeypatch, call):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    target = storage if call == "open" else Path
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


@pytest.mark.parametrize("suffix", storage.PICKLE_SUFFIXES)
def test_a_pickle_beside_the_files_is_refused_unopened(tmp_path, step, suffix):
    (step / f"x{suffix}").write_bytes(pickle.dumps(Canary(str(tmp_path / "canary"))))
    assert f"x{suffix} is not ours and may hold a pickle; refused unopened" in problem(step)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_under_our_names_is_never_executed(tmp_path, step, name):
    (step / name).write_bytes(pickle.dumps(Canary(str(tmp_path / "canary"))))
    if name != "MANIFEST.json":
        reseal(step)
    assert name in problem(step)
    assert not (tmp_path / "canary").exists()


WATCHED: list[str] | None = None
sys.addaudithook(lambda event, args: WATCHED.append(str(args[0])) if WATCHED is not None and event == "open" else None)


def opened_while_reading(path: Path) -> tuple[str, list[str]]:
    global WATCHED
    WATCHED = []
    try:
        return problem(path), list(WATCHED)
    finally:
        WATCHED = None


def first_rank(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["ranks"][1].update(values)


HOSTILE_INDEX: dict[str, Callable[[dict[str, Any]], Any]] = {
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
    "a list": lambda index: [],
    "nothing": lambda index: 0,
}


@pytest.mark.parametrize("kind", HOSTILE_INDEX)
def test_an_edited_index_is_refused(tmp_path, step, kind):
    (step.parent / "secret").write_bytes(payload(1))
    index = json.loads((step / "index.json").read_text())
    changed = HOSTILE_INDEX[kind](index)
    (step / "index.json").write_text(json.dumps(index if changed is None or changed == index else changed))
    assert "sha256" in problem(step) or "bytes" in problem(step), "an edit alone is found by the manifest"
    reseal(step)
    text, opened = opened_while_reading(step)
    assert str(step) in text
    assert opened and all(Path(name).parent == step or Path(name) == step for name in opened), opened


BODIES = {
    "empty": b"",
    "text": b"hello",
    "nested too deep": b"[" * 100_000,
    "a number too long": b'{"a": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("name", ["index.json", "state.json", "MANIFEST.json"])
def test_a_file_that_is_no_json_is_refused(step, name, body):
    (step / name).write_bytes(body)
    if name != "MANIFEST.json":
        reseal(step)
    assert f"{step / name}: is damaged" in problem(step)


def test_a_state_that_is_no_object_is_refused(step):
    (step / "state.json").write_text("[]")
    reseal(step)
    with pytest.raises(CheckpointError, match=r"state\.json: is damaged: holds no object"):
        Reader(step).state()


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
    "index not announced": lambda manifest: manifest | {"files": {"state.json": manifest["files"]["state.json"]}},
    "state not announced": lambda manifest: manifest | {"files": {"index.json": manifest["files"]["index.json"]}},
    "a list": lambda manifest: [manifest],
    "a number": lambda manifest: 1,
}


@pytest.mark.parametrize("kind", HOSTILE_MANIFEST)
def test_an_edited_manifest_is_refused(step, kind):
    (step.parent / "secret").write_bytes(payload(1))
    reseal(step, HOSTILE_MANIFEST[kind])
    text, opened = opened_while_reading(step)
    assert str(step) in text
    assert all(Path(name).parent == step or Path(name) == step for name in opened), opened


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_another_format_names_both_versions(step, version):
    reseal(step, lambda manifest: manifest | {"format": version})
    assert problem(step) == f"{step}: has format {version}, this release reads format 1"


# ---- writing ------------------------------------------------------------------------------------------------------


def test_an_existing_name_is_refused(tmp_path):
    final = save(tmp_path)
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    with pytest.raises(CheckpointError, match="exists already; a step directory is never written twice"):
        save(tmp_path)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


@pytest.mark.parametrize("kind", ["missing", "other size", "one more"])
def test_other_files_than_announced_name_the_shared_disk(tmp_path, kind):
    temporary, final = tmp_path / ".tmp", tmp_path / "step_00000001"
    index = write_ranks(temporary)
    if kind == "missing":
        (temporary / "rank_00001.bin").unlink()
    elif kind == "other size":
        os.truncate(temporary / "rank_00001.bin", 149)
    else:
        (temporary / "rank_00003.bin").touch()
    with pytest.raises(CheckpointError, match="is the run directory on a disk that all nodes share"):
        commit(temporary, final, index, {})
    assert not final.exists()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What asks the disk for durability, and what renames or deletes, in order, by names."""
    made: list[tuple[str, ...]] = []

    def record(name: str, *shown: int) -> None:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            paths = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else str(a) for a in args]
            made.append((name, *(Path(paths[i]).name for i in shown)))
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    record("fsync", 0)
    record("rename", 0, 1)
    record("replace", 0, 1)
    record("unlink", 0)
    return made


def test_everything_is_durable_before_it_has_its_name(tmp_path, calls):
    save(tmp_path / "checkpoints")
    made = [tuple("temporary" if part.startswith(".tmp-") else part for part in call) for call in calls]
    pid = os.getpid()
    expected: list[tuple[str, ...]] = [("fsync", f"rank_{rank:05d}.bin") for rank in range(3)]
    for name in ("index.json", "state.json", "MANIFEST.json"):
        hidden = f".{name}.{pid}"
        expected += [("fsync", hidden), ("replace", hidden, name), ("fsync", "temporary")]
    expected += [("rename", "temporary", "step_00000001"), ("fsync", "checkpoints")]
    assert [call for call in made if call[0] != "unlink"] == expected


def test_a_removal_is_durable_before_the_first_file_goes(tmp_path, calls):
    final = save(tmp_path / "checkpoints")
    calls.clear()
    remove([final])
    assert calls[:2] == [("rename", "step_00000001", ".trash-step_00000001"), ("fsync", "checkpoints")]
    assert {call[0] for call in calls[2:]} == {"unlink"} and len(calls) == 2 + 6
    assert list((tmp_path / "checkpoints").iterdir()) == []


class Disk:
    """A disk with room for some bytes; when it is full a write takes what fits, then fails."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def open(self, path: Path, mode: str) -> Any:
        if mode == "rb":
            return builtins.open(path, mode)
        return io.BufferedWriter(_FileOn(self, path, mode))


class _FileOn(io.FileIO):
    def __init__(self, disk: Disk, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        fitting = memoryview(data)[: self._disk.free_bytes]
        if not fitting and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._disk.free_bytes -= len(fitting)
        return super().write(fitting) or 0


@pytest.mark.faults
def test_a_full_disk_at_any_write_leaves_no_step(tmp_path, monkeypatch):
    total = sum(path.stat().st_size for path in save(tmp_path / "whole").iterdir())
    budgets = [*range(0, total, 37), total - 1]
    assert len(budgets) > 20
    for free_bytes in budgets:
        monkeypatch.setattr(storage, "open", Disk(free_bytes).open, raising=False)
        checkpoints = tmp_path / str(free_bytes)
        with pytest.raises(OSError) as caught:
            save(checkpoints)
        assert caught.value.errno == errno.ENOSPC
        assert steps_in(checkpoints) == []
    monkeypatch.setattr(storage, "open", Disk(total).open, raising=False)
    assert problem(save(tmp_path / "enough")) == ""


@pytest.mark.faults
def test_write_file_on_a_full_disk_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_file(path, b"old")
    for free_bytes in range(10):
        monkeypatch.setattr(storage, "open", Disk(free_bytes).open, raising=False)
        with pytest.raises(OSError, match="No space"):
            write_file(path, b"a new line")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(storage, "open", Disk(10).open, raising=False)
    write_file(path, b"a new line")
    assert path.read_bytes() == b"a new line" and list(tmp_path.iterdir()) == [path]


def killed_at(number: int, names: tuple[str, ...], work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed before its `number`-th call of these os functions; tell whether it was."""
    child = os.fork()
    if child == 0:
        left = number

        def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*args, **more)

            return call

        try:
            for name in names:
                setattr(os, name, deadly(getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


CALLS = ("fsync", "rename", "replace", "unlink", "rmdir")


@pytest.mark.faults
def test_write_file_killed_anywhere_leaves_old_or_new(tmp_path):
    path, seen = tmp_path / "latest", []
    for number in range(20):
        write_file(path, b"old")
        killed = killed_at(number, CALLS, lambda: write_file(path, b"new"))
        seen.append(path.read_bytes())
        assert seen[-1] in (b"old", b"new")
        if not killed:
            break
    assert seen[0] == b"old" and seen[-1] == b"new" and not killed and len(seen) > 3


@pytest.mark.faults
def test_save_killed_anywhere_leaves_a_whole_step_or_none(tmp_path):
    found = []
    for number in range(40):
        checkpoints = tmp_path / str(number)
        killed = killed_at(number, CALLS, lambda: save(checkpoints))  # noqa: B023  (called at once)
        steps = steps_in(checkpoints)
        assert all(problem(path) == "" for _, path in steps)
        found.append(len(steps))
        if not killed:
            break
    assert found[0] == 0 and found[-1] == 1 and sorted(found) == found and not killed and len(found) > 12


@pytest.mark.faults
def test_remove_killed_anywhere_leaves_no_half_step(tmp_path):
    found = []
    for number in range(40):
        checkpoints = tmp_path / str(number)
        save(checkpoints, 1)
        final = save(checkpoints, 2)
        killed = killed_at(number, CALLS, lambda: remove([final]))  # noqa: B023  (called at once)
        steps = steps_in(checkpoints)
        assert all(problem(path) == "" for _, path in steps)
        found.append(len(steps))
        if not killed:
            break
        save(checkpoints, 2) if len(steps) == 1 else None
        remove([final])  # what was left does not stand in the way of the next
        assert [number for number, _ in steps_in(checkpoints)] == [1]
    assert found[0] == 2 and found[-1] == 1 and not killed and len(found) > 7


def test_steps_are_listed_newest_first_and_nothing_else(tmp_path):
    assert steps_in(tmp_path / "nowhere") == []
    for name in ("step_00000009", "step_00000010", "step_100000000", ".tmp-step_00000011", ".trash-step_00000012"):
        (tmp_path / name).mkdir()
    for name in ("step_", "step_x", "step_²", "step_-1", "step_00000013.bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000014").touch()
    assert [step for step, _ in steps_in(tmp_path)] == [100_000_000, 10, 9]
