"""Read lanes ahead in a process of their own.

The process is started afresh with an import path and this module, rather than through multiprocessing: a
fork would copy the threads and locks of a process that has torch running, and multiprocessing's spawn would
import the parent's main module, torch with it, once for each worker. Groups of samples come back through a
pipe, many to a message: a message for each sample would cost more than tokenising it.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from dataclasses import asdict, dataclass, replace
from typing import IO

import numpy as np

from . import errors
from .errors import DataError
from .lanes import LaneGroup, SampleGroup, token_dtype
from .packing import CURSOR_COLUMNS, Cursor
from .stream_settings import OpenedSources, StreamSettings

FRAME_HEADER = struct.Struct("<cQ")  # kind, bytes of content
GROUP_FRAME, ERROR_FRAME = b"G", b"E"
GROUP_COUNTS = struct.Struct("<QQQ")  # samples, document starts, bytes of news
ROW_FIELDS = {
    "ids": 1,
    "sources": 1,
    "cursors": CURSOR_COLUMNS,
    "lengths": 1,
    "num_starts": 1,
}  # and their columns
GROUP_TOKENS = 1 << 17
MAX_GROUP_SAMPLES = 64
MIN_QUEUED_GROUPS = 4
PARENT_POLL_S = 0.25
PIPE_BYTES = 1 << 20
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

    ``cursors`` has rows ``(source, lane, chunk, part, token)`` for the lanes that have begun a source, and
    ``bad_chunks`` rows ``(source, chunk, bytes)``; ``samples_per_batch`` is what one global batch takes of these lanes.
    """

    settings: StreamSettings
    fingerprints: tuple[str, ...]
    position: int
    own_lanes: tuple[int, ...]
    cursors: tuple[tuple[int, int, int, int, int], ...]
    bad_chunks: tuple[tuple[int, int, int], ...]
    samples_per_batch: int

    @property
    def group_samples(self) -> int:
        """Return how many samples go into one message."""
        return max(1, min(MAX_GROUP_SAMPLES, GROUP_TOKENS // (self.settings.sequence_length + 1)))

    @property
    def queued_groups(self) -> int:
        """Return how many messages may wait: two global batches, so that one is ready when one is taken."""
        return max(MIN_QUEUED_GROUPS, -(-2 * self.samples_per_batch // self.group_samples))


class LocalReader:
    """Read lanes in this process."""

    def __init__(self, opened: OpenedSources, task: LaneTask) -> None:
        """Start at the task's cursors."""
        settings = task.settings
        self._counters, self._quarantine = opened.reader.counters, opened.quarantine
        self._quarantine.know(task.bad_chunks)
        self._group = LaneGroup(
            opened.sources,
            opened.mix,
            {(source, lane): Cursor(*place) for source, lane, *place in task.cursors},
            own_lanes=task.own_lanes,
            num_lanes=settings.lanes,
            position=task.position,
            lengths=settings.row_lengths,
            packing=settings.packing,
            seed=settings.seed,
            dtype=token_dtype(opened.tokenizer.vocab_size),
            short_fraction=settings.short_fraction,
        )

    def read(self, count: int) -> SampleGroup:
        """Return the next ``count`` samples, or what is left of them before rows get longer."""
        group = self._group.read(count)
        return replace(group, news=(*self._quarantine.take_news(), self._counters.take()))

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
        with contextlib.suppress(OSError):  # fewer switches between the two; the system may allow less
            fcntl.fcntl(self._frames, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
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
        """Return the next ``count`` samples, which are of one length, waiting for them.

        Raises what the worker raised, and DataError where it has died.
        """
        while sum(len(group.ids) for group in self._pending) < count:
            self._pending.append(self._receive())
        taken, rest = SampleGroup.join(self._pending).take(count)
        self._pending = [rest] if len(rest.ids) else []  # what follows may have longer rows
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
        return _unpack_group(content, self._dtype)

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
    task = LaneTask(**{**orders["task"], "settings": StreamSettings.of_json(orders["task"]["settings"])})
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
    opened = OpenedSources(task.settings)
    opened.check_same(task.fingerprints)
    reader = LocalReader(opened, task)
    while True:
        yield _pack_group(reader.read(task.group_samples))


def _pack_group(group: SampleGroup) -> bytes:
    news = json.dumps(group.news).encode()
    counts = GROUP_COUNTS.pack(len(group.ids), len(group.starts), len(news))
    return b"".join(
        (counts, news, *(getattr(group, name).tobytes() for name in (*ROW_FIELDS, "starts", "tokens")))
    )


def _unpack_group(content: bytes, dtype: np.dtype) -> SampleGroup:
    count, num_starts, num_news = GROUP_COUNTS.unpack_from(content)
    place = GROUP_COUNTS.size + num_news
    news = tuple(json.loads(content[GROUP_COUNTS.size : place]))
    arrays = {}
    for name, columns in (*ROW_FIELDS.items(), ("starts", 1)):
        size = num_starts if name == "starts" else count * columns
        arrays[name] = np.frombuffer(content, np.int64, size, place)
        place += arrays[name].nbytes
    arrays["cursors"] = arrays["cursors"].reshape(count, CURSOR_COLUMNS)
    tokens = np.frombuffer(content, dtype, offset=place).reshape(count, -1)
    return SampleGroup(**arrays, tokens=tokens, news=news)


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
