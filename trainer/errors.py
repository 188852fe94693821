"""What goes wrong in a run, and the exit code that says who should act. Imports no torch.

BasestoneError            1
|- ConfigError           64   the user's input; never retried
|- CheckpointError       74   storage failed, or no good checkpoint is left
|- NumericsError         76   data or numbers failed
`- Stopped               75   stopped on request; can go on

An OSError that speaks of files counts as 74, too: `exit_code_of`, `message_of`.
"""

from __future__ import annotations

import errno

EXIT_USER, EXIT_STORAGE, EXIT_STOPPED, EXIT_NUMERICS = 64, 74, 75, 76
EXIT_FAULT = 1  # of the program, or the loss of contact with another rank
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


CONTACT_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "remote process exited",
)


class BasestoneError(Exception):
    """An error whose message is written for the user: what, what was got, how to fix it."""

    exit_code = 1


class ConfigError(BasestoneError, ValueError):
    """The run file, a flag or a path is wrong."""

    exit_code = EXIT_USER


class CheckpointError(BasestoneError, ValueError):
    """A checkpoint cannot be written or read."""

    exit_code = EXIT_STORAGE


class NumericsError(BasestoneError, ValueError):
    """Losses or gradients are no longer finite."""

    exit_code = EXIT_NUMERICS


class Stopped(BasestoneError):
    """The run stopped on request after saving; the same command goes on."""

    exit_code = EXIT_STOPPED


def exit_code_of(error: BaseException) -> int:
    """Give the code to leave with: the error's own, 74 for an OSError about a file or a disk, else 1."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_ERRORS):
        return EXIT_STORAGE
    return getattr(error, "exit_code", EXIT_FAULT)


def lost_contact(error: BaseException) -> bool:
    """Tell whether a rank only lost contact with another one: an effect, by the words of gloo and NCCL."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CONTACT_WORDS)


def message_of(error: BaseException) -> str:
    """Give what to tell the user about an error."""
    if lost_contact(error):
        return "lost contact with another rank: it failed, was killed, or its machine is gone; its own log says why"
    if isinstance(error, OSError) and exit_code_of(error) == EXIT_STORAGE:
        place = "" if error.filename is None else f": {error.filename}"
        return (
            f"storage failed: {error.strerror or error}{place}; check free space, permissions and the state of "
            "the storage"
        )
    return str(error)
