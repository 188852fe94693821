"""Copies of step directories elsewhere, on a disk and at an S3 server: whole or not seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from copies import QUICK, Files, at, local_files, remote_problem, rewrite, step_of
from servers import S3Proxy, s3_endpoint
from step_files import BLOCK_BYTES, FILES, payload, read_range, reseal, save

from basestone.trainer.checkpoint.opening import newest_good, open_checkpoint, steps_at
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.remote import Copying, copy_step
from basestone.trainer.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("small_blocks")

ALL_FILES = ["rank_00000.bin", *FILES]


# ---- what is copied -----------------------------------------------------------------------------------------------


def test_a_copy_is_the_original_byte_for_byte(run, place):
    copy_step(step_of(run), place, QUICK)
    assert Files(place)() == local_files(run)
    copy = Reader(at(place))
    assert copy.verify() == [] and copy.state() == {"step": 4}
    assert read_range(copy, "rank_00001.bin", 10, 130) == payload(1)[10:140]
    assert copy.num_bytes == Reader(step_of(run)).num_bytes
    assert open_checkpoint(place).place == open_checkpoint(at(place)).place == at(place)


def test_every_range_of_a_copy_reads_as_written(run, place):
    copy_step(step_of(run), place, QUICK)
    copy = Reader(at(place))
    for start, num_bytes in ((0, 150), (0, 0), (149, 1), (63, 2), (64, 64), (1, 148), (150, 0)):
        assert read_range(copy, "rank_00001.bin", start, num_bytes) == payload(1)[start : start + num_bytes]
    with pytest.raises(CheckpointError, match=r"rank_00001\.bin: ends before byte 151"):
        read_range(copy, "rank_00001.bin", 0, 151)


def test_a_whole_copy_is_left_alone(run, bucket, moto):
    copy_step(step_of(run), "s3://runs/alone", QUICK)
    proxy = S3Proxy(moto)
    with s3_endpoint(proxy.url):
        copy_step(step_of(run), "s3://runs/alone", QUICK)
    proxy.close()
    assert proxy.requests and {method for method, _ in proxy.requests} <= {"GET", "HEAD"}


@pytest.mark.faults
def test_a_step_that_was_written_anew_replaces_its_copy(run, place):
    copy_step(step_of(run), place, QUICK)
    Files(place).write("checkpoints/step_00000004/rank_00009.bin", b"of more ranks")
    rewrite(run)
    copy_step(step_of(run), place, QUICK)
    assert Files(place)() == local_files(run)
    assert Reader(at(place)).verify() == [] and Reader(at(place)).state() == {"step": 7}


@pytest.mark.faults
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_copy_that_lacks_a_file_is_completed(run, place, name):
    copy_step(step_of(run), place, QUICK)
    Files(place).remove(f"checkpoints/step_00000004/{name}")
    copy_step(step_of(run), place, QUICK)
    assert Files(place)() == local_files(run)


def test_the_place_of_a_run_with_another_tokenizer_is_refused(run, place):
    copy_step(step_of(run), place, QUICK)
    (run / "run.toml").write_text("[run]\nseed = 1\n")
    copy_step(step_of(run), place, QUICK)
    (run / "tokenizer.model").write_bytes(b"others")
    before = Files(place)()
    assert before["run.toml"] == b"[run]\nseed = 1\n"
    with pytest.raises(
        CheckpointError,
        match=f"{place}: holds .* another run .tokenizer.model differs.; give every run a place of its",
    ):
        copy_step(step_of(run), place, QUICK)
    assert Files(place)() == before


def test_the_run_directory_is_no_place_for_its_own_copies(run):
    with pytest.raises(CheckpointError, match="is the run directory itself; choose another place"):
        copy_step(step_of(run), f"file://{run}", QUICK)


def test_what_is_not_a_finished_step_is_not_copied(run, tmp_path):
    (step_of(run) / "rank_00001.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"rank_00001\.bin is not what MANIFEST\.json says"):
        copy_step(step_of(run), str(tmp_path / "copies"), QUICK)
    (step_of(run) / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: is damaged"):
        copy_step(step_of(run), str(tmp_path / "copies"), QUICK)
    (step_of(run) / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="is no finished step directory"):
        copy_step(step_of(run), str(tmp_path / "copies"), QUICK)
    assert not (tmp_path / "copies").exists()


@pytest.mark.faults
def test_a_step_that_changes_under_the_copy_is_not_called_whole(run, bucket, moto):
    proxy = S3Proxy(moto)

    def swap(method: str, path: str) -> None:
        if method == "PUT" and "rank_00002" in path:
            rewrite(run)

    proxy.fault_for = swap
    with s3_endpoint(proxy.url):
        with pytest.raises(CheckpointError, match="was removed or written anew while it was copied"):
            copy_step(step_of(run), "s3://runs/swap", Copying(threads=1))
        assert steps_at("s3://runs/swap/checkpoints") == []
    proxy.close()
    copy_step(step_of(run), "s3://runs/swap", QUICK)
    assert Files("s3://runs/swap")() == local_files(run)


# ---- what is found there ------------------------------------------------------------------------------------------


def test_steps_are_listed_newest_first_and_half_copies_are_not(run, place):
    assert steps_at(f"{place}/checkpoints") == []
    for step in (8, 12, 100_000_000):
        save(run / "checkpoints", step)
    for step in (4, 8, 12, 100_000_000):
        copy_step(step_of(run, step), place, QUICK)
    files = Files(place)
    files.write("checkpoints/notes.txt", b"mine")
    assert steps_at(f"{place}/checkpoints") == [(step, at(place, step)) for step in (100_000_000, 12, 8, 4)]
    files.remove("checkpoints/step_100000000/MANIFEST.json")
    if "://" in place:
        assert [step for step, _ in steps_at(f"{place}/checkpoints/")] == [12, 8, 4]
    files.write("checkpoints/step_00000012/index.json", b"{}")
    assert newest_good(place).place == open_checkpoint(place).place == at(place, 8)


def test_what_others_have_changed_since_is_seen(run, bucket):
    copy_step(step_of(run), "s3://runs/others", QUICK)
    assert [step for step, _ in steps_at("s3://runs/others/checkpoints")] == [4]
    others = type(bucket)(skip_instance_cache=True)
    others.rm_file(f"{at('s3://runs/others')}/MANIFEST.json")
    assert steps_at("s3://runs/others/checkpoints") == []
    others.pipe_file(f"{at('s3://runs/others')}/MANIFEST.json", (step_of(run) / "MANIFEST.json").read_bytes())
    assert newest_good("s3://runs/others").verify() == []


def test_where_nothing_lies_there_is_no_checkpoint(place):
    with pytest.raises(CheckpointError, match=f"{place}/nothing: there is no such checkpoint directory"):
        open_checkpoint(f"{place}/nothing")
    with pytest.raises(CheckpointError, match=f"{place}: no good checkpoint: it holds none"):
        newest_good(place)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s4://bucket/run", r"^s4://bucket/run: the scheme s4:// is not known"),
        ("gs://bucket/run", r"^gs://bucket/run: the scheme gs:// needs .*pip install 'basestone\[gcs\]'"),
        ("http://user:secret@host/run", r"^http://host/run: http servers do not list files; copy it to a disk"),
    ],
)
def test_places_that_cannot_be_read_are_named_without_secrets(run, place, message):
    for act in (
        open_checkpoint,
        lambda place: steps_at(f"{place}/x"),
        lambda place: copy_step(step_of(run), place, QUICK),
    ):
        with pytest.raises(CheckpointError, match=message.replace(": ", "(/x)?: ", 1)) as caught:
            act(place)
        assert "secret" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_damage_at_the_other_place_is_found_and_named(run, place, name):
    copy_step(step_of(run), place, QUICK)
    files, good = Files(at(place)), (step_of(run) / name).read_bytes()
    where = f"{at(place)}/{name}"
    for position in (0, len(good) // 2, len(good) - 1):
        files.write(name, good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        text = remote_problem(at(place))
        assert where in text or (name == "MANIFEST.json" and at(place) in text and text), position
        if name.endswith(".bin"):
            block = position // BLOCK_BYTES * BLOCK_BYTES
            end = min(block + BLOCK_BYTES, len(good))
            assert text == f"{where}: bytes {block}..{end} do not match their sha256"
    for keep in (0, 1, len(good) // 2, len(good) - 1):
        files.write(name, good[:keep])
        assert name in remote_problem(at(place))
        if name != "MANIFEST.json":
            assert remote_problem(at(place)) == f"{where}: has {keep} bytes, {len(good)} were written"
    files.write(name, good)
    assert remote_problem(at(place)) == ""
    files.write("notes.txt", b"mine")
    assert (
        remote_problem(at(place))
        == f"{at(place)}/notes.txt: is not of this checkpoint: MANIFEST.json does not name it"
    )
    files.write("x.pt", b"")
    assert "x.pt is not ours and may hold a pickle; refused unopened" in remote_problem(at(place))


@pytest.mark.faults
@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_format_versions(run, place, version):
    reseal(step_of(run), lambda manifest: manifest | {"format": version})
    copy_step(step_of(run), place, QUICK)
    for where in (str(step_of(run)), at(place)):
        with pytest.raises(CheckpointError) as caught:
            Reader(where)
        assert str(caught.value) == f"{where}: has format {version}, this release reads format 1"


def test_blocks_that_follow_each_other_come_in_one_request(run, bucket, moto):
    copy_step(step_of(run), "s3://runs/blocks", QUICK)
    proxy = S3Proxy(moto)
    with s3_endpoint(proxy.url):
        copy = Reader(at("s3://runs/blocks"))
        proxy.requests.clear()
        assert read_range(copy, "rank_00001.bin", 0, 150) == payload(1)
        assert len(proxy.requests) == 1, "three blocks"
        read_range(copy, "rank_00001.bin", 100, 50)
        assert len(proxy.requests) == 1, "they are kept"
    proxy.close()


# ---- kills --------------------------------------------------------------------------------------------------------

# Forks a copy for every line of input, which is killed before its n-th change at the other place; says how it ended.
KILLED = """
import os, signal, sys
from pathlib import Path
import s3fs
from basestone.trainer.checkpoint.remote import Copying, copy_step

def count():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def deadly(name):
    real = getattr(os, name)
    def call(*args, **more):
        count()
        return real(*args, **more)
    setattr(os, name, call)

async def asked(files, method, *args, real=s3fs.S3FileSystem._call_s3, **more):
    if method.startswith(("put", "delete")):
        count()
    return await real(files, method, *args, **more)

directory, place = sys.argv[1:]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        left = int(line)
        s3fs.S3FileSystem._call_s3 = asked
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
            deadly(name)
        copy_step(Path(directory), place, Copying(threads=1))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def reset(place: str, content: dict[str, bytes]) -> None:
    """Let exactly this lie at a place."""
    files = Files(place)
    if "://" not in place:
        shutil.rmtree(place, ignore_errors=True)
    for name in files() if "://" in place else ():
        files.remove(name)
    for name, body in content.items():
        if "://" not in place:
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
        files.write(name, body)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["disk", "s3"])
@pytest.mark.parametrize("before", ["nothing", "another attempt"])
def test_remote_half_upload(run, bucket, tmp_path, kind, before):
    """Kill a copy before each change that it makes: what is there is whole or not seen, and the next completes it."""
    place = f"s3://runs/half-{before[:1]}" if kind == "s3" else str(tmp_path / "copies")
    copy_step(save(run / "checkpoints", 2), place, QUICK)
    if before != "nothing":
        copy_step(step_of(run), place, QUICK)
        rewrite(run)
    at_first, seen, killed = Files(place)(), [], True
    words = [sys.executable, "-c", KILLED, str(step_of(run)), place]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        while killed:
            reset(place, at_first)
            child.stdin.write(f"{len(seen)}\n")
            child.stdin.flush()
            status = int(child.stdout.readline())
            killed = os.WIFSIGNALED(status)
            assert killed or os.WEXITSTATUS(status) == 0
            steps = steps_at(f"{place}/checkpoints")
            assert [remote_problem(found) for _, found in steps] == [""] * len(steps), len(seen)
            seen.append([Reader(found).state()["step"] for _, found in steps])
            copy_step(step_of(run), place, QUICK)
            assert Files(place)() == local_files(run), len(seen)
    old, new = ([2], [4, 2]) if before == "nothing" else ([4, 2], [7, 2])
    assert seen[0] == old and seen[-1] == new and len(seen) > 6
    assert [state for at, state in enumerate(seen) if at == 0 or state != seen[at - 1]] in (
        [old, new],
        [old, [2], new],
    )
