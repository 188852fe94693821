"""Processes of a launch by host, pid and start, so that what is left of it can be ended, and nothing else.

`python -m basestone.launch.cluster.reap TOKEN` ends those of this host. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ...data.storage import write_atomic
from .job import decode

FOLDER = "pids"
GRACE_S = 5.0


@contextlib.contextmanager
def recorded(folder: Path, rank: int, pid: int) -> Iterator[None]:
    """Write down this process and its worker for as long as they are there."""
    path = folder / FOLDER / f"{socket.gethostname()}.{rank}.json"
    with contextlib.suppress(OSError):  # a full disk must not stop what could still train
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({str(one): _started_s(one) for one in (pid, os.getpid())}).encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def reap(folder: Path) -> int:
    """End what is left on this host, and give how many processes that were."""
    found: list[psutil.Process] = []
    for path in (folder / FOLDER).glob(f"{socket.gethostname()}.*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for pid, started_s in json.loads(path.read_text()).items():
                # A process that has the pid by now began at another time.
                if started_s is not None and _started_s(int(pid)) == started_s:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found.append(psutil.Process(int(pid)))
        path.unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [process for process in found if process.is_running()]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(left, timeout=GRACE_S)
    return len(found)


def _started_s(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def main() -> None:
    """End what is left on this host."""
    started_s = time.monotonic()
    num = reap(decode(sys.argv[1]).parent)
    print(
        f"{socket.gethostname()}: ended {num} process(es) in {time.monotonic() - started_s:.1f} s", flush=True
    )


if __name__ == "__main__":
    main()
