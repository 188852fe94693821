"""Name what can go wrong with data, and the exit code that each kind of failure ends the program with."""


class DataError(ValueError):
    """Report data that is damaged or does not say what its manifest says."""

    exit_code = 76


class DataConfigError(DataError):
    """Report input that the user has to change: a path, a file's form, a tokenizer, a setting."""

    exit_code = 64


class DataStorageError(DataError):
    """Report storage that failed while it was read or written: a full disk, an input/output error."""

    exit_code = 74
