"""Weights that `torch.save` wrote elsewhere, as a step directory. The only module that calls torch.load.

A file of torch.save is a pickle. It is unpickled by torch's own allow-list alone, from a mapped file, and everything
that comes out is compared with the parameter table before a byte of it is copied.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .config import ResolvedRun
from .errors import ConfigError
from .importing import global_tensors, kind_of, write_step
from .runtime import pickles_are_opened

WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers put the weights
MOST_PICKLE_BYTES = 1 << 28  # names and shapes of a million tensors


def import_weights(
    file: Path, out: Path, resolved: ResolvedRun, *, tokenizer_sha256: str, versions: dict[str, str]
) -> None:
    """Write the weights of a torch state dict as a step directory without optimizer state, at step 0.

    The dict is plain, or lies under "state_dict", "model" or "module". Its names are those of the family's Hugging
    Face class, or our own global ones.

    Args:
        out: the directory to make; it appears whole or not at all.

    Raises:
        ConfigError: the file is none of torch.save, wants more than torch's allow-list, or holds another model than
            the run's: every difference in one message.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already; remove it or name another")
    run = resolved.run
    tensors = global_tensors(file, _load(file), run.model, "the run file's [model]")
    write_step(
        out,
        run,
        tensors,
        imported_from=file.name,
        tokenizer_sha256=tokenizer_sha256,
        versions=versions,
    )


# ---- the file -----------------------------------------------------------------------------------------------------


def _load(file: Path) -> dict[str, Any]:
    """Unpickle a file of torch.save by torch's allow-list; give the state dict in it, mapped and not yet read."""
    if pickles_are_opened():
        raise ConfigError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets files run code as they are loaded; unset it"
        )
    _check_archive(file)
    with _torchs_own_allow_list():
        wanted = _tried(file, lambda: torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        if wanted:
            raise ConfigError(
                f"{file}: wants {', '.join(sorted(wanted))}, which is outside torch's allow-list and may run code; "
                "save the plain state dict alone: torch.save(model.state_dict(), ...)"
            )
        loaded = _tried(file, lambda: torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: holds {kind_of(loaded)} where a state dict belongs")
    return loaded


def _check_archive(file: Path) -> None:
    """Refuse what is no archive of torch.save, or one that grows as it is read."""
    if file.is_dir():
        raise ConfigError(f"{file}: is a directory; name the file in it that torch.save wrote")
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file")
    with open(file, "rb") as stream:
        magic = stream.read(4)
    if magic != b"PK\x03\x04" or not zipfile.is_zipfile(file):
        raise ConfigError(
            f"{file}: is no whole file of torch.save since version 1.6; load it where it was written, and save it "
            "again with a newer torch"
        )
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if packed := [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]:
        raise ConfigError(
            f"{file}: {packed[0]} is compressed, as torch.save never does; TorchScript files are not taken"
        )
    pickles = [member for member in members if member.filename.endswith("data.pkl")]
    if any(member.file_size > MOST_PICKLE_BYTES for member in pickles):
        raise ConfigError(f"{file}: its pickle has more than {MOST_PICKLE_BYTES >> 20} MiB; refused")


@contextmanager
def _torchs_own_allow_list() -> Iterator[None]:
    """Take away what libraries have added to the allow-list as they were imported, as Megatron-core does."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


def _tried(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # a damaged or hostile pickle raises whatever its instructions lead to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{file}: cannot be loaded as a state dict: {reason[0]}") from error
