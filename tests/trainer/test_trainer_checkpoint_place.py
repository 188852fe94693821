"""Where copies may go, as the start of a run sees it: no network, and nothing is left behind."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from basestone.trainer.checkpoint.remote import check_place
from basestone.trainer.errors import ConfigError
from basestone.trainer.rundir import RunDirectory


def refusal(place: str | Path, run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_place(str(place), run_dir)
    assert caught.value.exit_code == 64
    return str(caught.value).removeprefix(f"checkpoint.remote = {place}: ")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a network request")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_places_that_will_do(tmp_path, run):
    for place in (
        tmp_path / "a" / "copies",
        tmp_path / "a" / "copies",
        f"file://{tmp_path}/b",
        "s3://bucket/run",
    ):
        check_place(str(place), run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "run"]
    assert list((tmp_path / "a" / "copies").iterdir()) == list((tmp_path / "b").iterdir()) == []


def test_the_run_directory_itself_is_refused(tmp_path, run):
    (tmp_path / "link").symlink_to(run)
    for place in (run, f"file://{run}", tmp_path / "link", run / "checkpoints" / ".."):
        assert refusal(place, run) == "is the run directory itself; choose another place for its copies"


@pytest.mark.parametrize("name", ["lock", "ledger.json"])
def test_the_directory_of_another_run_is_refused(tmp_path, run, name):
    other = tmp_path / "other"
    directory = RunDirectory(other)
    directory.save_ledger()
    directory.close()
    assert refusal(other, run).startswith("holds lock and ledger.json, so it is another run's own directory;")
    (other / name).unlink()
    assert refusal(other, run).endswith("so it is another run's own directory; choose another place")


@pytest.mark.faults
def test_a_path_that_cannot_be_written_is_refused(tmp_path, run):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file", run) == "cannot be written (File exists); choose another place"
    assert refusal(tmp_path / "file" / "x", run) == "cannot be written (Not a directory); choose another place"
    assert refusal("/proc/copies", run).startswith("cannot be written (")
    assert refusal("/proc", run).startswith("cannot be written ("), "is there, but takes no file"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s4://bucket/run", "the scheme s4:// is not known"),
        (
            "gs://bucket/run",
            "the scheme gs:// needs a package that is not installed; pip install 'basestone[gcs]'",
        ),
        ("https://host/run", "cannot be written to; give a path or a bucket"),
        ("pipe:cat > x://y", "cannot be written to; give a path or a bucket"),
    ],
)
def test_urls_that_nothing_writes_to_are_refused(run, place, message):
    assert refusal(place, run).startswith(message)
