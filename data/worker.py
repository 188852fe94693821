"""Read lanes ahead in a process of their own.

The process is started afresh with an import path and this module, rather than through multiprocessing: a
fork would copy the threads and locks of a process that has torch running, and multiprocessing's spawn would
import the parent's main module, torch with it, once for each worker. Groups of samples come back through a
pipe, many to a message: a message for each sample would cost more than tokenising it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from . import errors
from .errors import DataError
from .lanes import CURSOR_COLUMNS, ChunkSequence, Cursor, LaneGroup, SampleGroup, data_fingerprint, token_dtype
from .shards import open_filled_shard_set
from .tokenizer import Tokenizer

FRAME_HEADER = struct.Struct("<cQ")  # kind, bytes of content
GROUP_FRAME, ERROR_FRAME = b"G", b"E"
GROUP_COUNT = struct.Struct("<Q")
GROUP_TOKENS = 1 << 17
MAX_GROUP_SAMPLES = 64
MIN_QUEUED_GROUPS = 4
PARENT_POLL_S = 0.25
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
BOOTSTRAP = """
import json, sys
sys.path[:] = json.loads(sys.stdin.readline())
sys.modules["torch"] = None  # webdataset imports torch where it finds it: seconds and memory for nothing here
from {package}.worker import main
main()
"""


@dataclass(frozen=True)
class LaneTask:
    """Say what a reader has to read. JSON-able.

    ``cursors`` has a row ``(lane, chunk, document, token)`` for each lane; ``samples_per_batch`` is what one
    global batch takes of them.
    """

    directories: tuple[str, ...]
    tokenizer: str
    fingerprint: str
    seed: int
    lanes: int
    position: int
    sequence_length: int
    cursors: tuple[tuple[int, int, int, int], ...]
    samples_per_batch: int

    @property
    def group_samples(self) -> int:
        """Return how many samples go into one message."""
        return max(1, min(MAX_GROUP_SAMPLES, GROUP_TOKENS // (self.sequence_length + 1)))

    @property
    def queued_groups(self) -> int:
        """Return how many messages may wait: two global batches, so that one is ready when one is taken."""
        return max(MIN_QUEUED_GROUPS, -(-2 * self.samples_per_batch // self.group_samples))


class LocalReader:
    """Read lanes in this process."""

    def __init__(self, chunks: ChunkSequence, task: LaneTask, dtype: np.dtype) -> None:
        """Start at the task's cursors."""
        self._group = LaneGroup(
            chunks,
            {lane: Cursor(chunk, document, token) for lane, chunk, document, token in task.cursors},
            lanes=task.lanes,
            position=task.position,
            sequence_length=task.sequence_length,
            dtype=dtype,
        )

    def read(self, count: int) -> SampleGroup:
        """Return the next ``count`` samples."""
        return self._group.read(count)

    def close(self) -> None:
        """Do nothing: there is no process to end."""


class WorkerReader:
    """Read lanes in another process, which ends with this one whatever way this one ends."""

    def __init__(self, task: LaneTask, dtype: np.dtype, number: int) -> None:
        """Start the process; it begins to read at once."""
        self._task, self._dtype, self._number = task, dtype, number
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP.format(package=__package__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._end = weakref.finalize(self, _end_process, self._process, os.getpid())
        assert self._process.stdin is not None and self._process.stdout is not None
        self._frames: IO[bytes] = self._process.stdout
        orders = [json.dumps(sys.path), json.dumps({"parent": os.getpid(), "task": asdict(task)})]
        try:
            self._process.stdin.write("".join(f"{order}\n" for order in orders).encode())
            self._process.stdin.close()
        except OSError:
            raise self._death() from None
        self._pending: list[SampleGroup] = []

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def read(self, count: int) -> SampleGroup:
        """Return the next ``count`` samples, waiting for them.

        Raises what the worker raised, and DataError where it has died.
        """
        while sum(len(group.ids) for group in self._pending) < count:
            self._pending.append(self._receive())
        pending = SampleGroup(
            np.concatenate([group.ids for group in self._pending]),
            np.concatenate([group.cursors for group in self._pending]),
            np.concatenate([group.tokens for group in self._pending]),
        )
        taken, rest = pending.take(count)
        self._pending = [rest]
        return taken

    def close(self) -> None:
        """End the process."""
        self._end()

    def _receive(self) -> SampleGroup:
        header = self._frames.read(FRAME_HEADER.size)
        if len(header) < FRAME_HEADER.size:
            raise self._death()
        kind, size = FRAME_HEADER.unpack(header)
        content = self._frames.read(size)
        if len(content) < size:
            raise self._death()
        if kind == ERROR_FRAME:
            failure = json.loads(content)
            raise getattr(errors, failure["class"])(failure["message"])
        return _unpack_group(content, self._task.sequence_length, self._dtype)

    def _death(self) -> DataError:
        status = self._process.wait()
        self.close()
        name = f"data worker {self._number} (process {self._process.pid})"
        if status == -signal.SIGKILL:
            return DataError(
                f"{name} was killed (SIGKILL), most often for want of memory; give the job more memory or set "
                "data.workers lower"
            )
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return DataError(f"{name} {how}; its last words are in the log above")


def main() -> None:
    """Serve as a worker: read the task from standard input, write frames to standard output."""
    for number in STOP_SIGNALS:
        # a signal to the whole job asks the trainer to finish its step, for which it needs its data
        signal.signal(number, signal.SIG_IGN)
    frames = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not get between the frames
    orders = json.loads(sys.stdin.readline())
    end_with_parent(orders["parent"])
    task = LaneTask(**orders["task"])
    waiting: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(maxsize=task.queued_groups)
    sender = threading.Thread(target=_send_frames, args=(frames, waiting), daemon=True)
    sender.start()
    try:
        for group in _read_groups(task):
            waiting.put((GROUP_FRAME, group))
    except Exception as error:
        waiting.put((ERROR_FRAME, json.dumps(_describe(error)).encode()))
    waiting.put(None)
    sender.join()


def end_with_parent(parent: int) -> None:
    """End this process soon after process ``parent`` is gone, even if it was killed.

    The kernel's parent-death signal would also fire when only the thread that started this process ends.
    """
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _read_groups(task: LaneTask) -> Iterator[bytes]:
    tokenizer = Tokenizer(Path(task.tokenizer))
    shard_sets = [open_filled_shard_set(Path(directory)) for directory in task.directories]
    if data_fingerprint(shard_sets, tokenizer) != task.fingerprint:
        raise DataError("the data or the tokenizer changed while the run was starting; start it again")
    reader = LocalReader(
        ChunkSequence(shard_sets, tokenizer, task.seed), task, token_dtype(tokenizer.vocab_size)
    )
    while True:
        yield _pack_group(reader.read(task.group_samples))


def _pack_group(group: SampleGroup) -> bytes:
    count = GROUP_COUNT.pack(len(group.ids))
    return b"".join((count, group.ids.tobytes(), group.cursors.tobytes(), group.tokens.tobytes()))


def _unpack_group(content: bytes, sequence_length: int, dtype: np.dtype) -> SampleGroup:
    (count,) = GROUP_COUNT.unpack_from(content)
    ids = np.frombuffer(content, np.int64, count, GROUP_COUNT.size)
    place = GROUP_COUNT.size + ids.nbytes
    cursors = np.frombuffer(content, np.int64, count * CURSOR_COLUMNS, place)
    tokens = np.frombuffer(content, dtype, offset=place + cursors.nbytes)
    return SampleGroup(ids, cursors.reshape(count, CURSOR_COLUMNS), tokens.reshape(count, sequence_length + 1))


def _send_frames(frames: IO[bytes], waiting: queue.Queue[tuple[bytes, bytes] | None]) -> None:
    try:
        while (frame := waiting.get()) is not None:
            kind, content = frame
            for part in (FRAME_HEADER.pack(kind, len(content)), content):
                view = memoryview(part)
                while view:
                    view = view[frames.write(view) :]
    except OSError:
        os._exit(0)  # the reader of the pipe is gone


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(0)


def _describe(error: Exception) -> dict[str, str]:
    if isinstance(error, DataError):
        return {"class": type(error).__name__, "message": str(error)}
    traceback.print_exc()
    return {"class": "DataError", "message": f"a data worker failed: {type(error).__name__}: {error}"}


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner inherits this duty, but not the process
    process.kill()  # it holds nothing that has to be put away
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
