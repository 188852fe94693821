"""What goes wrong in a run, and the exit code that says who should act. Imports no torch.

BasestoneError            1
|- ConfigError           64   the user's input; never retried
|- CheckpointError       74   storage failed, or no good checkpoint is left
|- NumericsError         76   data or numbers failed
`- Stopped               75   stopped on request; can go on
"""

from __future__ import annotations

EXIT_USER, EXIT_STORAGE, EXIT_STOPPED, EXIT_NUMERICS = 64, 74, 75, 76


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
