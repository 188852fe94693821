"""Prefetch processes: they fail loudly and never outlive what started them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from streams import open_stream, stream_settings

from basestone.data.errors import DataConfigError, DataError
from basestone.data.stream import TokenStream

pytestmark = pytest.mark.faults
TESTS = str(Path(__file__).parents[1])
START = """
import sys, time
sys.path.insert(0, {tests!r})
from streams import open_stream
stream = open_stream([sys.argv[1]], sys.argv[2], sequence_length=32, global_batch=8, seed=1, workers=2)
stream.next_batch()
print(*stream.worker_pids, flush=True)
{then}
"""


def small_stream(shards: Path, model: Path, workers: int) -> TokenStream:
    return open_stream([shards], model, sequence_length=32, global_batch=8, seed=1, workers=workers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pids: tuple[int, ...], limit_s: float = 10.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.05)
    return False


def flip_bit(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_a_killed_worker_is_an_error_that_says_so(text_shards: Path, model: Path) -> None:
    stream = small_stream(text_shards / "train", model, 2)
    stream.next_batch()
    pids = stream.worker_pids
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(DataError, match=rf"data worker 1 \(process {pids[1]}\) was killed \(SIGKILL\).*memory"):
        for _ in range(10_000):
            stream.next_batch()
    assert wait_gone(pids)


def test_a_crashed_worker_names_its_signal(text_shards: Path, model: Path) -> None:
    stream = small_stream(text_shards / "train", model, 1)
    stream.next_batch()
    os.kill(stream.worker_pids[0], signal.SIGSEGV)
    with pytest.raises(DataError, match="was ended by SIGSEGV; its last words are in the log"):
        for _ in range(10_000):
            stream.next_batch()


def test_job_signals_leave_workers_at_work(text_shards: Path, model: Path) -> None:
    stream, plain = (small_stream(text_shards / "train", model, workers) for workers in (1, 0))
    stream.next_batch()
    plain.next_batch()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(stream.worker_pids[0], number)
    for _ in range(300):
        assert (stream.next_batch().tokens == plain.next_batch().tokens).all()
    stream.close()


def test_workers_hold_no_torch_and_end_on_close(text_shards: Path, model: Path) -> None:
    stream = small_stream(text_shards / "train", model, 1)
    stream.next_batch()
    (pid,) = stream.worker_pids
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "numpy" in maps and "libtorch" not in maps
    stream.close()
    assert not is_running(pid)


def test_a_dropped_stream_ends_its_workers(text_shards: Path, model: Path) -> None:
    stream = small_stream(text_shards / "train", model, 2)
    pids = stream.worker_pids
    del stream
    assert wait_gone(pids)


@pytest.mark.parametrize("then", ["time.sleep(600)", "pass", "raise SystemExit(3)"])
def test_workers_end_with_their_parent(then: str, text_shards: Path, model: Path) -> None:
    script = START.format(then=then, tests=TESTS)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(text_shards / "train"), str(model)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = tuple(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2
    if "sleep" in then:
        assert all(map(is_running, pids))
        parent.kill()
    parent.wait(timeout=30)
    parent.stdout.close()
    assert wait_gone(pids)


def test_workers_end_though_a_fork_of_the_parent_lives(text_shards: Path, model: Path) -> None:
    """The fork keeps the pipes open, so the workers cannot tell the parent's end by them."""
    script = START.format(then='import os\nos.write(1, b"%d\\n" % os.fork())\ntime.sleep(60)', tests=TESTS)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(text_shards / "train"), str(model)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = tuple(map(int, parent.stdout.readline().split()))
    fork = max(
        int(parent.stdout.readline()), int(parent.stdout.readline())
    )  # one of the two lines is the child's 0
    try:
        parent.kill()
        parent.wait(timeout=30)
        assert wait_gone(pids) and is_running(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_is_found_and_placed(
    workers: int, text_shards: Path, model: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(text_shards / "train", shards)
    flip_bit(shards / "00000.tar", 700)
    stream = small_stream(shards, model, workers)
    with pytest.raises(
        DataError, match=r"shard .*00000.tar, bytes 0-\d+: checksum is [0-9a-f]{8}, expected"
    ) as caught:
        for _ in range(10_000):
            stream.next_batch()
    assert caught.value.exit_code == 76


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_while_training_is_found(
    workers: int, text_shards: Path, model: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(text_shards / "train", shards)
    stream = small_stream(shards, model, workers)
    stream.next_batch()
    for file in shards.glob("*.tar"):
        with open(file, "r+b") as handle:
            handle.truncate(512)
    with pytest.raises(DataError, match=r"bytes \d+-\d+: got \d+ bytes, expected \d+; the shard was cut"):
        for _ in range(10_000):
            stream.next_batch()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_lost_while_training_is_a_storage_error(
    workers: int, text_shards: Path, model: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(text_shards / "train", shards)
    stream = small_stream(shards, model, workers)
    stream.next_batch()
    shutil.rmtree(shards)
    with pytest.raises(DataError, match=r"shard .*, bytes \d+-\d+: No such file") as caught:
        for _ in range(10_000):
            stream.next_batch()
    assert caught.value.exit_code == 74


def test_data_that_changes_during_the_start_is_refused(text_shards: Path, model: Path, tmp_path: Path) -> None:
    from basestone.data.lanes import token_dtype
    from basestone.data.worker import LaneTask, WorkerReader

    def task(shards: Path, tokenizer: str) -> LaneTask:
        settings = stream_settings([shards], Path(tokenizer), sequence_length=32, lanes=1, seed=1)
        return LaneTask(settings, ("other",), 0, (0,), (), (), 1)

    with pytest.raises(DataError, match="changed while the run was starting"):
        WorkerReader(task(text_shards / "train", str(model)), token_dtype(600), 0).read(1)
    with pytest.raises(DataConfigError, match="does not exist"):
        WorkerReader(task(tmp_path / "no", str(model)), token_dtype(600), 0).read(1)
    with pytest.raises(DataError, match="a data worker failed: ValueError: embedded null byte"):
        WorkerReader(task(text_shards / "train", "\0"), token_dtype(600), 0).read(1)
