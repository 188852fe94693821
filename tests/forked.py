"""A child process that does something and then stays alive, to be killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from basestone.trainer.errors import ConfigError


def in_child(work: Callable[[], str]) -> tuple[int, str]:
    """Do `work` in a child process that then stays alive; give its id and what it said."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                text = work()
            except ConfigError as error:
                text = f"refused: {error}"
            os.write(theirs, text.encode() or b"nothing")
            while True:
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    return child, text


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
