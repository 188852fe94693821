"""The first process of a node: gives it its host name and mounts, then lives as long as the test that started it.

Started by nodes.py inside new namespaces as `python -I -S init.py NAME DIRECTORY`. It prints its process id as the
test sees it, and ends with its standard input: a test session that is killed takes its nodes with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def mount(*arguments: str) -> None:
    """Mount for this node alone: its mounts are private."""
    subprocess.run(["mount", *arguments], check=True)


def prepare(name: str, directory: Path) -> None:
    """Set the host name, replace files of /etc by those in `directory`/etc, and mount what a machine has of its own."""
    socket.sethostname(name)
    mount("-t", "proc", "proc", "/proc")
    mount("-t", "sysfs", "sysfs", "/sys")  # /sys/class/net shows the network of who mounts it
    for file in (directory / "etc").iterdir():
        mount("--bind", str(file), f"/etc/{file.name}")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    Path("/run/lock").mkdir()


def main() -> None:
    """Prepare the node, say so, and wait."""
    host_pid = os.readlink("/proc/self")  # still the /proc of the test
    prepare(sys.argv[1], Path(sys.argv[2]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the node are reaped by the kernel
    print(host_pid, flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
