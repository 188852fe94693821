"""The lock of a run directory: one run at a time, and given back however its process ends. Imports no torch.

RUN/lock is locked by flock(2), which the kernel ends with the process, and names its holder. Where the file system
gives no such locks, RUN/lock.beat holds a counter that the holder raises: a start that finds one watches whether it
moves. Counters are compared, never clocks, which differ between hosts and jump.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.storage import write_atomic
from .errors import ConfigError, message_of

log = logging.getLogger(__name__)
LOCK, BEAT = "lock", "lock.beat"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
BEAT_S = 10.0  # between two beats
LETTING_GO_TRIES = 20
WATCH_S = 60.0  # a counter that stands still for so long has no run any more


class RunLock:
    """Holds a run directory from its creation to `close()`, or to the end of the process.

    A process that is forked from the holder lets go of it at once: a reader that outlives a killed run keeps nothing.
    """

    def __init__(self, run_dir: Path, *, beat_s: float = BEAT_S, watch_s: float = WATCH_S) -> None:
        """Take the lock of a directory that is there.

        Args:
            beat_s, watch_s: where the file system gives no locks, how often the counter is raised, and how long
                somebody else's is watched.

        Raises:
            ConfigError: another run holds it; the message names its process. Or its lock is a link.
        """
        self._run_dir = run_dir
        self._beat: _Beat | None = None
        self._descriptor: int | None = open_lock(run_dir)
        try:
            locked = self._flock(self._descriptor)
            _outwait(run_dir, beat_s, watch_s)
            if locked:
                (run_dir / BEAT).unlink(missing_ok=True)
            else:
                self._beat = _Beat(run_dir, beat_s)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_myself()).encode() + b"\n", 0)
        except BaseException:
            self.close()
            raise
        os.register_at_fork(after_in_child=functools.partial(_let_go, weakref.ref(self)))

    def _flock(self, descriptor: int) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        tries = LETTING_GO_TRIES
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _parsed(os.pread(descriptor, 4096, 0))
                keepers = _holding(os.fstat(descriptor)) if _is_dead(holder) else []
                tries -= 1
                if not tries or keepers or not _is_dead(holder):
                    raise ConfigError(_refusal(self._run_dir, holder, keepers)) from error
                time.sleep(0.05)  # a process is just ending, or was just forked and lets go
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return False
            else:
                return True

    def let_go(self) -> None:
        """Forget the lock in a forked process: the holder keeps it."""
        self._beat = None  # its thread was not forked, and its file is the holder's
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def close(self) -> None:
        """Give the lock back."""
        if self._beat is not None:
            self._beat.stop()
        self.let_go()


def open_lock(run_dir: Path) -> int:
    """Open RUN/lock, made where needed, and give its descriptor.

    Raises:
        ConfigError: it is a link: whatever that points to would be written over.
        OSError: it cannot be written.
    """
    path = run_dir / LOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP or not path.is_symlink():
            raise
        raise ConfigError(f"{path}: is a link, and a lock must be a file; remove the link") from error


def holder_of(run_dir: Path) -> str | None:
    """Name the process that a run directory's lock names, without touching it; None where it is known to have ended.

    Of another host's process nobody here knows whether it is still there.
    """
    holder = _parsed(_content(run_dir / LOCK) or b"")
    return None if not holder or _is_dead(holder) else _named(holder)


def is_held(run_dir: Path) -> bool:
    """Tell whether a run holds a run directory; where there are no locks to ask, whether its holder may be alive."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return holder_of(run_dir) is not None
    finally:
        os.close(descriptor)
    return (run_dir / BEAT).exists() and holder_of(run_dir) is not None


def _let_go(reference: weakref.ref[RunLock]) -> None:
    lock = reference()
    if lock is not None:
        lock.let_go()


class _Beat:
    """Raises the counter in lock.beat until it is stopped."""

    def __init__(self, run_dir: Path, every_s: float) -> None:
        """Begin to beat.

        Raises:
            ConfigError: another start began to at the same time.
        """
        self._run_dir, self._every_s, self._count = run_dir, every_s, 0
        self._path, self._token = run_dir / BEAT, uuid.uuid4().hex
        self._stopped = threading.Event()
        self._raise_counter()
        time.sleep(every_s / 5)  # of two that found no beat, the one that wrote last stays
        owner = _parsed(_content(self._path) or b"")
        if owner.get("token") != self._token:
            raise ConfigError(
                f"run directory {run_dir}: {_named(owner)} began at the same time, and holds it; choose another"
            )
        self._thread = threading.Thread(target=self._run, name="lock.beat", daemon=True)
        self._thread.start()

    def _raise_counter(self) -> None:
        self._count += 1
        body = {**_myself(), "token": self._token, "count": self._count}
        write_atomic(self._path, json.dumps(body).encode() + b"\n")

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            owner = _parsed(_content(self._path) or b"")
            if owner.get("token", self._token) != self._token:
                log.error(
                    "run directory %s: %s has taken it over, as this process did not raise its counter; stop one of "
                    "them",
                    *(self._run_dir, _named(owner)),
                )
                return
            try:
                self._raise_counter()
            except OSError as error:
                log.warning("the counter of the lock was not raised: %s", message_of(error))

    def stop(self) -> None:
        """Beat no more, and leave no file behind that another start would wait for."""
        self._stopped.set()
        self._thread.join()
        if _parsed(_content(self._path) or b"").get("token") == self._token:
            self._path.unlink(missing_ok=True)


def _outwait(run_dir: Path, beat_s: float, watch_s: float) -> None:
    """Where there is a counter, see that it stands still; refuse where it moves."""
    first = _content(run_dir / BEAT)
    if first is None:
        return
    owner = _named(_parsed(first))
    log.warning("run directory %s: %s may hold it; watching its counter for %g s", *(run_dir, owner, watch_s))
    end_s = time.monotonic() + watch_s
    while time.monotonic() < end_s:
        time.sleep(beat_s / 4)
        now = _content(run_dir / BEAT)
        if now is None:
            return
        if now != first:
            raise ConfigError(_refusal(run_dir, _parsed(now), []))
    log.warning("run directory %s: the counter of %s stands still; taking over", *(run_dir, owner))


def _refusal(run_dir: Path, holder: dict[str, Any], keepers: list[str]) -> str:
    """Say who holds a run directory; `keepers` are the processes that hold its lock where the holder is dead."""
    if _is_dead(holder):
        return (
            f"run directory {run_dir}: {_named(holder)} is dead, but its lock is held by "
            f"{', '.join(keepers) or 'a process that cannot be seen from here'}; stop what is left of it, or choose "
            "another directory"
        )
    here = not holder or holder.get("host") == socket.gethostname()
    elsewhere = "" if here else "; on NFS the lock of a host that died lasts about 90 s"
    return (
        f"run directory {run_dir}: another run holds it ({_named(holder)}); wait for it, stop it, or choose another "
        f"directory{elsewhere}"
    )


def _holding(locked: os.stat_result) -> list[str]:
    """Name the processes that hold a file's lock now.

    /proc/locks knows the process that took it only; who has inherited it stands in fdinfo.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                status = descriptor.stat()
                same = (status.st_dev, status.st_ino) == (locked.st_dev, locked.st_ino)
                if same and "FLOCK" in (process / "fdinfo" / descriptor.name).read_text():
                    found.append(f"pid {process.name} ({(process / 'comm').read_text().strip()})")
                    break
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return sorted(found)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Tell whether a holder is of this host and has ended."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _myself() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
