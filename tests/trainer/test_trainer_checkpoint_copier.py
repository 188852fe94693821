"""The thread that copies checkpoints: what is told, and that nothing of it reaches the run."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from copies import QUICK, Files, at, local_files, step_of
from servers import S3Proxy, s3_endpoint
from step_files import save

from basestone.trainer.checkpoint.copier import Copier, Outcome
from basestone.trainer.checkpoint.opening import newest_good, steps_at
from basestone.trainer.checkpoint.remote import copy_step, set_aside_later
from basestone.trainer.checkpoint.writer import remove

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def copier() -> Iterator[Callable[..., Copier]]:
    """Make copiers that stop after the test."""
    made: list[Copier] = []

    def make(place: str, **settings: Any) -> Copier:
        made.append(Copier(place, threads=3, **{"attempts": 2, **settings}))
        return made[-1]

    yield make
    for one in made:
        one.close(0)


def finished(copier: Copier) -> list[Outcome]:
    copier.close(60)
    assert copier.busy == frozenset()
    return copier.take_outcomes()


def test_what_is_offered_is_copied(run, place, copier):
    one = copier(place)
    assert one.take_outcomes() == [] and one.busy == frozenset()
    one.offer(step_of(run))
    assert finished(one) == [("step_00000004", None)]
    assert one.take_outcomes() == []
    assert Files(place)() == local_files(run)


def test_a_copier_that_was_offered_nothing_closes(copier):
    assert finished(copier("s3://nowhere")) == []


def test_the_newest_wins_and_what_was_passed_over_is_told(run, bucket, moto, copier):
    for step in (8, 12, 16):
        save(run / "checkpoints", step)
    begun, go = threading.Event(), threading.Event()
    proxy = S3Proxy(moto)

    def hold(method: str, path: str) -> None:
        begun.set()
        go.wait(60)

    proxy.fault_for = hold
    with s3_endpoint(proxy.url):
        one = copier("s3://runs/newest")
        one.offer(step_of(run, 4))
        assert begun.wait(60)
        assert one.busy == {"step_00000004"}
        for step in (8, 12, 16):
            one.offer(step_of(run, step))
        assert one.busy == {"step_00000004", "step_00000016"}
        go.set()
        outcomes = finished(one)
    proxy.close()
    assert outcomes == [
        ("step_00000008", "was passed over for step_00000012: copies take longer than saves"),
        ("step_00000012", "was passed over for step_00000016: copies take longer than saves"),
        ("step_00000004", None),
        ("step_00000016", None),
    ]
    assert [step for step, _ in steps_at("s3://runs/newest/checkpoints")] == [16, 4]


def test_copies_of_a_line_that_was_left_no_longer_count(run, place, copier):
    for step in (8, 12):
        save(run / "checkpoints", step)
        copy_step(step_of(run, step), place, QUICK)
    remove([step_of(run, 8), step_of(run, 12)])
    one = copier(place)
    one.offer(step_of(run))
    told = "is later than step_00000004 and of a line that was left; its copy no longer counts"
    assert finished(one) == [("step_00000004", None), ("step_00000008", told), ("step_00000012", told)]
    assert newest_good(place).place == at(place)
    assert set_aside_later(4, place, QUICK) == []
    save(run / "checkpoints", 8)
    copy_step(step_of(run, 8), place, QUICK)
    assert newest_good(place).verify() == [] and newest_good(place).place == at(place, 8)


def test_left_copies_on_a_disk_all_stay(run, tmp_path):
    place = str(tmp_path / "copies")
    kept = []
    for _ in range(3):
        kept.append((save(run / "checkpoints", 8, attempt=len(kept)) / "MANIFEST.json").read_bytes())
        copy_step(step_of(run, 8), place, QUICK)
        remove([step_of(run, 8)])
        assert set_aside_later(4, place, QUICK) == ["step_00000008"]
    left = list((tmp_path / "copies" / "checkpoints").glob(".left-step_00000008-*"))
    assert sorted((path / "MANIFEST.json").read_bytes() for path in left) == sorted(kept)


@pytest.mark.faults
def test_a_server_that_fails_now_and_then_gets_every_byte(run, bucket, moto, copier):
    proxy, number = S3Proxy(moto), iter(range(1_000_000))
    proxy.fault_for = lambda method, path: (None, 503, None, None, 500)[next(number) % 5]
    with s3_endpoint(proxy.url):
        one = copier("s3://runs/now-and-then", attempts=6)
        one.offer(step_of(run))
        outcomes = finished(one)
    proxy.close()
    assert outcomes == [("step_00000004", None)] and next(number) > 20
    assert Files("s3://runs/now-and-then")() == local_files(run)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["rank_00001.bin", "MANIFEST.json"])
def test_a_file_that_cannot_be_written_is_an_outcome(run, bucket, moto, copier, name):
    place, proxy = f"s3://runs/cannot-{name[:4]}", S3Proxy(moto)
    proxy.fault_for = lambda method, path: 403 if method == "PUT" and name in path else None
    with s3_endpoint(proxy.url):
        one = copier(place)
        one.offer(step_of(run))
        ((step, problem),) = finished(one)
        assert step == "step_00000004"
        assert problem.startswith(f"{at(place)}/{name}: PermissionError: ")
        assert (
            problem.endswith("; check the place, the credentials and the storage") and "testing" not in problem
        )
        assert steps_at(f"{place}/checkpoints") == []
    proxy.close()
    one = copier(place)
    one.offer(step_of(run))
    assert finished(one) == [("step_00000004", None)]


@pytest.mark.faults
def test_a_server_that_is_away_is_an_outcome_and_the_next_offer_tries_anew(run, bucket, moto, copier):
    proxy = S3Proxy(moto)
    with s3_endpoint(proxy.url):
        one = copier("s3://runs/away")
        proxy.fault_for = lambda method, path: 500
        one.offer(step_of(run))
        wait_idle(one)
        ((step, problem),) = one.take_outcomes()
        assert step == "step_00000004" and problem.startswith("s3://runs/away") and "(tried 2 times)" in problem
        proxy.fault_for = lambda method, path: None
        one.offer(step_of(run))
        assert finished(one) == [("step_00000004", None)]
    proxy.close()
    with s3_endpoint("http://127.0.0.1:1"):
        one = copier("s3://runs/away")
        one.offer(step_of(run))
        ((_, problem),) = finished(one)
        assert "Could not connect to the endpoint" in problem


def wait_idle(copier: Copier) -> None:
    with copier._changed:
        assert copier._changed.wait_for(lambda: copier._current is None and copier._waiting is None, 60)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://no-such-bucket/run", "s3://no-such-bucket/run/tokenizer.model: FileNotFoundError: "),
        ("s4://bucket/run", "s4://bucket/run: the scheme s4:// is not known"),
        ("FILE/copies", "Not a directory"),
    ],
)
def test_a_place_that_is_not_there_is_an_outcome(run, bucket, copier, place, message):
    one = copier(place.replace("FILE", str(run / "run.toml")))
    one.offer(step_of(run))
    ((step, problem),) = finished(one)
    assert step == "step_00000004" and message in problem and "\n" not in problem


@pytest.mark.faults
def test_a_step_that_was_pruned_before_its_turn_is_an_outcome(run, tmp_path, copier):
    one = copier(str(tmp_path / "copies"))
    one.offer(step_of(run, 8))
    assert finished(one) == [("step_00000008", f"{step_of(run, 8)}: is no finished step directory")]


@pytest.mark.faults
def test_a_full_disk_leaves_nothing_of_the_copy(run, tmp_path):
    place = tmp_path / "copies"
    code = """
import resource, signal, sys
from pathlib import Path
from basestone.trainer.checkpoint.remote import Copying, copy_step
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (140, 140))
copy_step(Path(sys.argv[1]), sys.argv[2], Copying(threads=2))
"""
    words = [sys.executable, "-c", code, str(step_of(run)), str(place)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    where = place / "checkpoints" / ".tmp-copy-step_00000004"
    assert f"CheckpointError: storage failed: File too large: {where}/" in done.stderr
    assert list((place / "checkpoints").iterdir()) == []
    copy_step(step_of(run), str(place), QUICK)
    assert Files(str(place))() == local_files(run)


@pytest.mark.faults
def test_a_server_that_hangs_keeps_no_process_from_leaving(run):
    code = """
import sys
from pathlib import Path
from basestone.trainer.checkpoint.copier import Copier
copier = Copier("s3://runs/hung", threads=2)
copier.offer(Path(sys.argv[1]))
copier.offer(Path(sys.argv[2]))
copier.close(0.5)
print(copier.take_outcomes())
"""
    save(run / "checkpoints", 8)
    words = [sys.executable, "-c", code, str(step_of(run)), str(step_of(run, 8))]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with s3_endpoint(url):
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        "step_00000008', problem='was not copied within 0.5 s of the end; it lies in the run directory"
        in done.stdout
    )
    assert done.stderr == ""
