"""The run directory: one owner at a time, records that outlive a kill, a ledger that adds up over attempts."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest
from forked import in_child, kill
from hypothesis import given
from hypothesis import strategies as st

from basestone.trainer.errors import ConfigError, NumericsError, exit_code_of, message_of
from basestone.trainer.meters.ledger import Ledger
from basestone.trainer.rundir import RunDirectory, make_run_directory, tell_failure


def test_a_refused_run_changes_nothing(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.save_ledger()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError):
        RunDirectory(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    directory.close()


@pytest.mark.parametrize("make", [make_run_directory, RunDirectory])
def test_a_directory_that_cannot_be_made_is_refused(tmp_path, make):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another") as caught:
        make(tmp_path / "file" / "run")
    assert caught.value.exit_code == 64


# ---- the ledger ---------------------------------------------------------------------------------------------------


def attempt(ledger: Ledger, tokens: int, joules: float | None = None) -> None:
    """Train for so many tokens, a second each."""
    ledger.tokens += tokens
    ledger.train_s += tokens
    if joules is not None:
        ledger.joules = (ledger.joules or 0.0) + joules


def test_a_run_that_is_never_cut_wastes_nothing():
    ledger = Ledger()
    attempt(ledger, 100, 5.0)
    ledger.resume_from(ledger.useful())
    assert (ledger.wasted_tokens, ledger.wasted_s, ledger.wasted_joules) == (0, 0, 0)


def test_what_evaluates_and_saves_after_the_last_step_is_not_wasted():
    ledger = Ledger()
    attempt(ledger, 100, 10.0)
    saved = ledger.useful()
    ledger.joules += 3.0
    ledger.resume_from(saved)
    assert (ledger.joules, ledger.wasted_joules) == (13.0, 0.0)
    attempt(ledger, 50, 5.0)
    ledger.resume_from(saved)
    assert (ledger.wasted_tokens, ledger.wasted_joules) == (50, 8.0), "now steps after it were lost"


def test_two_crashes_between_checkpoints_add_up():
    ledger = Ledger()
    attempt(ledger, 100, 10.0)
    first = ledger.useful()
    attempt(ledger, 60, 6.0)  # and a crash
    ledger.resume_from(first)
    assert (ledger.tokens, ledger.wasted_tokens, ledger.wasted_s, ledger.wasted_joules) == (160, 60, 60.0, 6.0)
    attempt(ledger, 100, 10.0)
    second = ledger.useful()
    assert second == {"joules": 20.0, "train_s": 200.0, "tokens": 200}
    attempt(ledger, 40, 4.0)  # and another
    ledger.resume_from(second)
    assert (ledger.tokens, ledger.wasted_tokens, ledger.wasted_s, ledger.wasted_joules) == (
        300,
        100,
        100.0,
        10.0,
    )
    assert ledger.useful() == second


def test_going_back_to_an_older_checkpoint_wastes_all_after_it():
    ledger = Ledger()
    attempt(ledger, 100)
    first = ledger.useful()
    attempt(ledger, 100)
    ledger.resume_from(ledger.useful())
    attempt(ledger, 100)
    ledger.resume_from(first)
    assert (ledger.tokens, ledger.wasted_tokens) == (300, 200)
    assert ledger.joules is None and ledger.wasted_joules == 0.0


def test_a_start_without_a_checkpoint_wastes_everything_before():
    ledger = Ledger(tokens=50, train_s=5.0, joules=2.0)
    ledger.resume_from({})
    assert (ledger.wasted_tokens, ledger.wasted_s, ledger.wasted_joules) == (50, 5.0, 2.0)


def test_a_lost_ledger_begins_at_the_checkpoints_figures():
    ledger = Ledger()
    useful = {"joules": 20.0, "train_s": 200.0, "tokens": 200}
    ledger.resume_from(useful)
    assert ledger.useful() == useful and ledger.wasted_tokens == 0
    attempt(ledger, 30, 3.0)  # and a crash: this is lost, and not hidden by what the ledger did not know
    ledger.resume_from(useful)
    assert (ledger.tokens, ledger.wasted_tokens, ledger.wasted_joules) == (230, 30, pytest.approx(3.0))


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=8))
def test_total_is_useful_plus_wasted_over_any_attempts(attempts):
    ledger, useful = Ledger(), 0
    point = ledger.useful()
    for saved, lost in attempts:
        attempt(ledger, saved, float(saved))
        useful += saved
        point = ledger.useful()
        attempt(ledger, lost, float(lost))
        ledger.resume_from(point)
    assert ledger.tokens == sum(map(sum, attempts)) and ledger.useful()["tokens"] == useful
    assert ledger.wasted_tokens == ledger.tokens - useful == ledger.wasted_s == ledger.wasted_joules


@pytest.mark.parametrize("durable", [False, True])
def test_the_ledger_outlives_a_kill(tmp_path, durable):
    def train() -> str:
        directory = RunDirectory(tmp_path)
        attempt(directory.ledger, 70, 7.0)
        directory.ledger.joules_source = "user-watts"
        directory.save_ledger(durable)
        attempt(directory.ledger, 1000)
        return "trained"

    child, _ = in_child(train)
    kill(child)
    directory = RunDirectory(tmp_path)
    assert directory.ledger == Ledger(2, 7.0, "user-watts", train_s=70.0, tokens=70) and directory.attempt == 2
    assert [path.name for path in tmp_path.glob("*ledger*")] == ["ledger.json"]
    directory.close()


@pytest.mark.parametrize("body", ["", "{", "[]", "7", '{"unknown": 1}'])
def test_a_damaged_ledger_does_not_stop_a_run(tmp_path, body):
    (tmp_path / "ledger.json").write_text(body)
    directory = RunDirectory(tmp_path)
    assert directory.ledger == Ledger(attempts=1)
    directory.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", "two"),
        ("attempts", 1.5),
        ("attempts", None),
        ("joules", "many"),
        ("train_s", True),
        ("wasted_s", None),
        ("tokens", [1]),
        ("joules_source", 7),
    ],
)
def test_a_ledger_of_other_types_is_refused_and_kept(tmp_path, name, value):
    body = json.dumps({"attempts": 3, "tokens": 70, name: value})
    (tmp_path / "ledger.json").write_text(body)
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'ledger.json'}: {name} = {json.dumps(value)} is no figure of a ledger; put it right, or move the "
        "file away: the totals then begin at the checkpoint's"
    )
    assert (tmp_path / "ledger.json").read_text() == body
    (tmp_path / "ledger.json").unlink()
    RunDirectory(tmp_path).close()  # the lock is free


def test_a_ledger_without_energy_is_taken(tmp_path):
    (tmp_path / "ledger.json").write_text(json.dumps({"attempts": 3, "joules": None, "train_s": 7}))
    directory = RunDirectory(tmp_path)
    assert directory.ledger == Ledger(attempts=4, train_s=7)
    directory.close()


@pytest.mark.parametrize("make", [make_run_directory, RunDirectory])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "ledger.json", "COMPLETE", "FAILED", "latest", "run.toml"]
)
def test_a_folder_in_place_of_a_file_is_refused(tmp_path, make, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError) as caught:
        make(tmp_path)
    assert str(caught.value) == (
        f"run directory {tmp_path}: {name} must be a file and is a directory; move it away, or choose another run "
        "directory"
    )
    (tmp_path / name).rmdir()
    RunDirectory(tmp_path).close()


# ---- records ------------------------------------------------------------------------------------------------------


def test_records_carry_attempt_and_time_and_are_appended(tmp_path):
    for number in (1, 2):
        directory = RunDirectory(tmp_path)
        directory.metric({"kind": "step", "step": number, "loss": float("nan")})
        directory.event(number, "start", "übrigens\nzwei Zeilen")
        directory.save_ledger()
        directory.close()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(row["step"], row["attempt"]) for row in metrics] == [(1, 1), (2, 2)]
    assert [(row["step"], row["attempt"], row["message"]) for row in events] == [
        (1, 1, "übrigens\nzwei Zeilen"),
        (2, 2, "übrigens\nzwei Zeilen"),
    ]
    assert all(row["time"].endswith("+00:00") for row in metrics + events)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_torn_line_is_closed_and_costs_no_other(tmp_path, name):
    whole = b'{"step": 1}\n'
    (tmp_path / name).write_bytes(whole + b'{"step": 2, "lo')
    directory = RunDirectory(tmp_path)
    directory.metric({"step": 3})
    directory.event(3, "resume")
    directory.close()
    lines = (tmp_path / name).read_text().split("\n")
    assert (
        lines[:2] == ['{"step": 1}', '{"step": 2, "lo']
        and json.loads(lines[2])["step"] == 3
        and lines[3:] == [""]
    )
    RunDirectory(tmp_path).close()
    assert (tmp_path / name).read_text().split("\n") == lines, "a whole last line is left alone"


def test_exactly_one_mark_is_left(tmp_path):
    directory = RunDirectory(tmp_path)

    def marks() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir() if path.name.isupper()}

    assert marks() == {}
    for marker in ("RESUME", "FAILED", "COMPLETE", "COMPLETE"):
        directory.mark(marker, "step 7")
        assert marks() == {marker: "step 7\n"}
    directory.mark(None)
    assert marks() == {}
    directory.close()


# ---- a disk that is full ------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_record_that_finds_no_space_names_its_file(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    directory = RunDirectory(tmp_path)
    with pytest.raises(OSError) as caught:
        directory.metric({"step": 1}) if name == "metrics.jsonl" else directory.event(1, "save")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / name)
    assert exit_code_of(caught.value) == 74
    assert message_of(caught.value) == (
        f"storage failed: No space left on device: {tmp_path / name}; check free space, permissions and the state "
        "of the storage"
    )
    directory.close()


@pytest.mark.faults
def test_a_record_that_fits_in_part_is_an_error(tmp_path):
    """A disk that fills up takes the beginning of a line without an error."""

    def write() -> str:
        directory = RunDirectory(tmp_path)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
        try:
            directory.metric({"step": 1})
        except OSError as error:
            return os.strerror(error.errno)
        return "written"

    child, text = in_child(write)
    kill(child)
    assert text == os.strerror(errno.EFBIG) and (tmp_path / "metrics.jsonl").stat().st_size == 10


@pytest.mark.faults
def test_recording_a_failure_never_raises(tmp_path, caplog):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    directory = RunDirectory(tmp_path)
    directory.fail(7, NumericsError("the loss is not finite"))
    assert (tmp_path / "FAILED").read_text() == "step 7: the loss is not finite\n"
    assert "the failure was not recorded in events.jsonl: storage failed: No space" in caplog.text
    (tmp_path / f".FAILED.{os.uname().nodename}.{os.getpid()}").symlink_to("/dev/full")
    (tmp_path / "FAILED").unlink()
    directory.fail(7, NumericsError("the loss is not finite"))
    assert (tmp_path / "FAILED").read_text() == "", "its name at least is there"
    directory.close()


@pytest.mark.faults
def test_closing_saves_the_ledger_and_never_raises(tmp_path, caplog):
    directory = RunDirectory(tmp_path)
    directory.close()
    assert json.loads((tmp_path / "ledger.json").read_text())["attempts"] == 1
    (tmp_path / ".ledger.json").symlink_to("/dev/full")
    RunDirectory(tmp_path).close()
    assert "the ledger was not saved: storage failed: No space left on device" in caplog.text
    RunDirectory(tmp_path).close()  # the lock is free


def test_only_errors_of_files_are_storages():
    assert exit_code_of(OSError(errno.ENOSPC, "full")) == exit_code_of(FileNotFoundError(2, "no", "file")) == 74
    assert exit_code_of(ConnectionResetError(errno.ECONNRESET, "reset")) == exit_code_of(RuntimeError("x")) == 1
    lost = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:20153")
    assert exit_code_of(lost) == 1 and message_of(lost).startswith("lost contact with another rank")
    assert exit_code_of(ConfigError("x")) == 64 and exit_code_of(NumericsError("x")) == 76
    assert message_of(ConnectionResetError(errno.ECONNRESET, "reset")) == "[Errno 104] reset"


# ---- why a run failed ---------------------------------------------------------------------------------------------


def test_the_rank_that_knows_why_is_kept_by_one_that_lost_contact(tmp_path):
    directory = RunDirectory(tmp_path)
    tell_failure(tmp_path, 1, 7, NumericsError("a shard is damaged"))
    directory.fail(7, RuntimeError("Connection closed by peer"))
    assert (tmp_path / "FAILED").read_text() == "step 7: rank 1: a shard is damaged\n"
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["event"], event["message"]) == ("fail", "rank 1: a shard is damaged")
    directory.fail(7, NumericsError("mine"))
    assert (tmp_path / "FAILED").read_text() == "step 7: mine\n", "its own cause it knows better"
    directory.close()


def test_a_rank_that_fails_while_another_begins_is_not_forgotten(tmp_path):
    tell_failure(tmp_path, 1, 7, NumericsError("long ago"))
    directory = RunDirectory(tmp_path)
    tell_failure(tmp_path, 1, 0, NumericsError("a shard is damaged"))
    directory.mark(None)
    directory.fail(0, RuntimeError("Connection closed by peer"))
    assert (tmp_path / "FAILED").read_text() == "step 0: rank 1: a shard is damaged\n"
    directory.close()


def test_what_an_earlier_attempt_left_is_not_taken_for_the_cause(tmp_path):
    tell_failure(tmp_path, 1, 7, NumericsError("long ago"))
    directory = RunDirectory(tmp_path)
    directory.fail(8, RuntimeError("Connection closed by peer"))
    assert (tmp_path / "FAILED").read_text().startswith("step 8: lost contact with another rank")
    directory.close()
    directory = RunDirectory(tmp_path)
    directory.mark(None)
    assert not (tmp_path / "FAILED").exists()
    directory.close()


def test_a_rank_that_knows_nothing_says_nothing(tmp_path, caplog):
    tell_failure(tmp_path, 1, 7, RuntimeError("Connection closed by peer"))
    assert list(tmp_path.iterdir()) == []
    tell_failure(tmp_path / "gone", 1, 7, NumericsError("damaged"))
    assert "the failure was not marked: storage failed: No such file" in caplog.text
