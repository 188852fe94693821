"""A preparation that is killed goes on with what is finished, and ends with the bytes of one that was not."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from basestone.data.errors import DataConfigError, DataStorageError
from basestone.data.prepare import PrepareProgress, _input_fingerprint, prepare
from basestone.data.preparing.document import load_tokenizer
from basestone.data.preparing.settings import CorpusSettings
from basestone.data.sources import find_named_files

OPTIONS: dict[str, Any] = {
    "near_duplicates": True,
    "scrub": True,
    "rules": ("gopher",),
    "heldout_fraction": 0.1,
}


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def pieces_of(out: Path) -> dict[Path, int]:
    """Give the finished pieces beside an unfinished corpus, and when each was written."""
    found = out.parent.glob(f".{out.name}.unfinished/pieces-*/0*.npz")
    return {file: file.stat().st_mtime_ns for file in found}


@pytest.fixture()
def source(tmp_path: Path) -> Path:
    """Some 45 pieces in files of several kinds: one large, many small, one that ends in damage."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = []
    for number in range(10):
        lines += [json.dumps({"text": f"{number} {text[:700]} {number}"}) for text in sorted(topics.values())]
    (folder / "a.jsonl").write_text("\n".join(lines[:450]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[450:]).encode()))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:300]).encode())[:-2000])
    for number in range(100):
        (folder / f"d{number:03d}.txt").write_text(
            f"number {number} has a file of its own, and few words in it"
        )
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut smaller pieces, for a corpus of test size; forked processes cut them as well."""
    monkeypatch.setattr("basestone.data.preparing.pieces.BATCH_DOCUMENTS", 25)


def run_and_kill(source: Path, out: Path, after_s: float, workers: int) -> bool:
    """Prepare in a process that is killed after a time; tell whether it had ended by then."""
    context = multiprocessing.get_context("fork")
    settings = {**OPTIONS, "workers": workers}
    process = context.Process(target=prepare, args=([str(source)], out), kwargs=settings)
    process.start()
    process.join(after_s)
    ended = not process.is_alive()
    if not ended:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not ended or process.exitcode == 0
    return ended


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_it_ends_with_the_same_bytes(source: Path, tmp_path: Path, workers: int) -> None:
    prepare([str(source)], tmp_path / "first", **OPTIONS)  # imports take longer than all the rest
    begun = time.monotonic()
    prepare([str(source)], tmp_path / "whole", **OPTIONS, workers=workers)  # with the start of a worker
    whole_s = time.monotonic() - begun
    generator, out = random.Random(workers), tmp_path / "out"
    kills, before = 0, {}
    while kills < 60:
        # ever longer, so that it ends, even where the machine has become many times slower since
        after_s = generator.uniform(0, whole_s * 0.1 * 1.12**kills)
        if run_and_kill(source, out, after_s, workers):
            break
        kills += 1
        if out.exists():  # killed while it cleaned up: the same command does that, and says it is done
            with pytest.raises(DataConfigError, match="exists and is not empty"):
                prepare([str(source)], out, **OPTIONS)
            break
        now = pieces_of(out)
        assert before.items() <= now.items()  # what was finished was neither removed nor made again
        before = now
    assert tree(out) == tree(tmp_path / "whole") and kills >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "in", "out", "whole"]


@pytest.mark.faults
def test_the_command_goes_on_after_a_kill(source: Path, tmp_path: Path) -> None:
    """With worker processes of its own, killed once pieces are there; fewer workers may go on."""
    out, root = tmp_path / "out", Path(__file__).parents[2]
    command = [sys.executable, "-m", "basestone.launch", "prepare", str(source), "--out", str(out)]
    command += ["--near-duplicates", "--scrub", "--rules", "gopher", "--heldout-fraction", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([*command, "--workers", "2"], env=environment, stdout=subprocess.DEVNULL)
    while len(pieces_of(out)) < 4 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    finished = pieces_of(out)
    assert len(finished) >= 4 and not out.exists()
    done = subprocess.run(
        [*command, "--workers", "0", "--json"], env=environment, capture_output=True, check=True
    )
    prepare([str(source)], tmp_path / "whole", **OPTIONS)
    assert {name: content for name, content in tree(out).items() if name != "report.json"} == {
        name: content for name, content in tree(tmp_path / "whole").items() if name != "report.json"
    }
    assert json.loads(done.stdout) == json.loads((out / "report.json").read_bytes())


def stop_after(pieces: int) -> Any:
    """Give a report of progress that fails as a disk does, when some pieces are written."""
    seen: list[PrepareProgress] = []

    def progress(now: PrepareProgress) -> None:
        seen.append(now)
        if len(seen) == pieces:
            raise OSError(28, "No space left on device")

    return progress


def test_what_is_finished_is_taken_up_where_input_and_settings_are_the_same(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare([str(source)], tmp_path / "whole", **OPTIONS)

    def interrupted(**settings: Any) -> dict[Path, int]:
        with pytest.raises(DataStorageError, match="No space left"):
            prepare([str(source)], out, progress=stop_after(10), **{**OPTIONS, **settings})
        return pieces_of(out)

    first = interrupted()
    assert len(first) == 10 and interrupted(workers=0) == first
    other = interrupted(min_chars=5)  # other settings: begun anew, and the old pieces are gone
    assert len(other) == 10 and not {path.parent for path in other} & {path.parent for path in first}
    os.utime(source / "a.jsonl")  # so does another time or size of a source
    again = interrupted(min_chars=5)
    assert not {path.parent for path in other} & {path.parent for path in again}
    damaged = sorted(again)[3]
    damaged.write_bytes(damaged.read_bytes()[:-300])  # as after a power cut
    interrupted(min_chars=5)
    prepare([str(source)], out, **{**OPTIONS, "min_chars": 5})
    shutil.rmtree(tmp_path / "whole")
    prepare([str(source)], tmp_path / "whole", **{**OPTIONS, "min_chars": 5})
    assert tree(out) == tree(tmp_path / "whole")


def test_the_users_mistake_keeps_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match="no document is left"):
        prepare([str(source)], tmp_path / "out", min_chars=10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_users_mistake_that_comes_late_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    """As where a filter's model file is missing: with it there, the same command goes on."""

    def progress(now: PrepareProgress) -> None:
        if now.documents_read >= 250:
            raise DataConfigError("something is missing")

    with pytest.raises(DataConfigError, match="something is missing"):
        prepare([str(source)], tmp_path / "out", progress=progress, **OPTIONS)
    finished = pieces_of(tmp_path / "out")
    assert len(finished) == 10
    with pytest.raises(DataStorageError):
        prepare([str(source)], tmp_path / "out", progress=stop_after(11), **OPTIONS)
    assert finished.items() < pieces_of(tmp_path / "out").items()


def fingerprint(source: Path, **settings: Any) -> str:
    files = find_named_files([str(source)])
    return _input_fingerprint(files, CorpusSettings(**settings))


def test_the_fingerprint_of_pieces_knows_all_that_they_depend_on(
    source: Path, tmp_path: Path, model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, tokenizer = tmp_path / "test.txt", tmp_path / "own.model"
    test.write_text("one two three")
    tokenizer.write_bytes(model.read_bytes())
    settings: dict[str, Any] = {"decontaminate": (test,), "tokenizer": tokenizer}
    first = fingerprint(source, **settings)
    assert fingerprint(source, **settings, workers=3) == first
    os.utime(test, ns=(1, 1))
    second = fingerprint(source, **settings)
    test.write_text("one two three four")
    os.utime(test, ns=(1, 1))
    third = fingerprint(source, **settings)
    tokenizer.write_bytes(other_model.read_bytes())  # under the same name
    load_tokenizer.cache_clear()
    fourth = fingerprint(source, **settings)
    assert len({first, second, third, fourth}) == 4
    found = set()
    for package in (
        "ftfy",
        "trafilatura",
        "lxml",
        "pyarrow",
        "warcio",
        "sentencepiece",
        "tokenizers",
        "tiktoken",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                "basestone.data.prepare.version",
                lambda name, own=package: "0.0" if name == own else version(name),
            )
            found.add(fingerprint(source, **settings))
    assert len(found) == 8 and fourth not in found
    load_tokenizer.cache_clear()


def test_what_was_left_when_the_corpus_had_its_name_is_removed(source: Path, tmp_path: Path) -> None:
    """As after a kill in the moment between the two."""
    out = tmp_path / "out"
    with pytest.raises(DataStorageError):
        prepare([str(source)], out, progress=stop_after(3))
    prepare([str(source)], tmp_path / "whole")
    (tmp_path / "whole").rename(out)
    with pytest.raises(DataConfigError, match="exists and is not empty"):
        prepare([str(source)], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.faults
def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    def inside(_: PrepareProgress) -> None:
        with pytest.raises(DataConfigError, match=r"another process is writing .*out; wait for it to finish"):
            prepare([str(source)], tmp_path / "out")

    prepare([str(source)], tmp_path / "out", progress=inside)


def test_the_default_output_is_golden(tmp_path: Path) -> None:
    """Plain text in, these bytes out: a corpus prepared again must be the one that runs were trained on."""
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
    ]
    lines = []
    for number in range(600):
        state, text = number * 2654435761 % 2**32, []
        for _ in range(5 + number % 90):
            state = (state * 1664525 + 1013904223) % 2**32
            text.append(words[state >> 28 if state >> 28 < 12 else 3])
            if state >> 24 & 15 == 0:
                text.append("\r\n")
        ends = ("\x07" if number % 7 == 0 else "") + (" müße 敏捷" if number % 5 == 0 else "")
        lines.append(json.dumps({"text": " ".join(text) + ends}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines + lines[:40]))
    report = prepare(
        [str(tmp_path / "in.jsonl")],
        tmp_path / "out",
        heldout_fraction=0.1,
        shard_bytes=100_000,
        chunk_bytes=4096,
    )
    found = hashlib.sha256()
    for name, content in sorted(tree(tmp_path / "out").items()):
        if "/" in name:
            found.update(f"out/{name}".encode() + content)
    assert found.hexdigest() == "8c653e5ad327487dd5c866172103c249544f7e8f6bf7400d83f752800618a4f7"
    assert report.train_fingerprint == "343dc7beb646fc48833307ceced841f0312b7e4dcf87f2c7db6f965d56eda7ea"
    assert (report.dropped, report.train_documents) == ({"duplicate": 40, "too_short": 1}, 539)


def test_every_dropped_document_has_its_line(tmp_path: Path) -> None:
    lines = ["x", "one text that is long enough to be kept", "", "another text that is long enough to be kept"]
    lines += [lines[1], lines[3], lines[1]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines) + "{\n")
    report = prepare([str(tmp_path / "in.jsonl")], tmp_path / "out", heldout_fraction=0)
    written = (tmp_path / "out" / "dropped.jsonl.gz").read_bytes()
    found = [json.loads(line) for line in gzip.decompress(written).splitlines()]
    place = f"{tmp_path}/in.jsonl:"
    assert found == [
        {"origin": f"{place}1", "reason": "too_short"},
        {"origin": f"{place}3", "reason": "empty"},
        {"origin": f"{place}5", "reason": "duplicate", "kept": f"{place}2"},
        {"origin": f"{place}6", "reason": "duplicate", "kept": f"{place}4"},
        {"origin": f"{place}7", "reason": "duplicate", "kept": f"{place}2"},
        {"origin": f"{place}8", "reason": "bad_json"},
    ]
    assert sum(report.dropped.values()) == len(found) and written[4:8] == bytes(4)  # no time in the header
