"""Hold the place of a corpus while it is written, and what a killed preparation left there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DataConfigError
from ..storage import rename_directory

CORPUS_NAME = "corpus"
REPORT_NAME, DROPPED_NAME = "report.json", "dropped.jsonl.gz"
TRAIN_NAME, HELDOUT_NAME = "train", "heldout"


@contextmanager
def unfinished_directory(out: Path, keep: str | None = None) -> Iterator[Path]:
    """Give a directory to fill that takes the name ``out`` when the block ends well.

    It lies in ``.NAME.unfinished`` beside ``out``. There a folder called ``keep`` beside it, unless it is
    empty, outlives a kill and any error, for the next process with the same ``keep``; everything else that was
    left is removed. Raises DataConfigError where ``out`` holds something or another process is writing it.
    """
    unfinished = out.with_name(f".{out.name}.unfinished")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if unfinished.is_dir():
            with _locked(unfinished, out):  # killed between the corpus getting its name and cleaning up
                shutil.rmtree(unfinished, ignore_errors=True)
        raise DataConfigError(f"{out} exists and is not empty; give another place, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished.mkdir(exist_ok=True)
    with _locked(unfinished, out):
        kept = keep
        try:
            _clear(unfinished, keep)
            (unfinished / CORPUS_NAME).mkdir()
            yield unfinished / CORPUS_NAME
            rename_directory(unfinished / CORPUS_NAME, out)
            kept = None
        finally:
            _clear(unfinished, kept)
            if not any(unfinished.iterdir()):
                unfinished.rmdir()


@contextmanager
def _locked(unfinished: Path, out: Path) -> Iterator[None]:
    descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(unfinished)):
                raise FileNotFoundError("the directory was removed before the lock was had")
        except OSError as error:
            raise DataConfigError(f"another process is writing {out}; wait for it to finish") from error
        yield
    finally:
        os.close(descriptor)


def _clear(directory: Path, keep: str | None) -> None:
    for entry in directory.iterdir():
        if entry.name == keep and any(entry.iterdir()):
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
