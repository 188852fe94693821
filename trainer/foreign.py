"""Weights that `torch.save` wrote elsewhere, as a step directory. The only module that calls torch.load.

A file of torch.save is a pickle. It is unpickled by torch's own allow-list alone, from a mapped file, and everything
that comes out is compared with the parameter table before a byte of it is copied.
"""

from __future__ import annotations

import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.hf.adapter import adapter_for
from ..model.layout import Parameter, decoder_layout
from .checkpoint.tensors import index_of
from .checkpoint.writer import RankWriter, commit
from .config import ResolvedRun
from .engine_state import MASTER
from .errors import ConfigError
from .runtime import pickles_are_opened

WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers put the weights
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # constants that old versions saved
MOST_PICKLE_BYTES = 1 << 28  # names and shapes of a million tensors
MOST_PROBLEMS = 20  # to print


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
    model = resolved.run.model
    table = decoder_layout(model)
    state_dict = _load(file)
    state = {
        "step": 0,
        "tokens": 0,
        "optimizer_steps": 0,
        "imported_from": file.name,
        "run": resolved.run.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer_sha256,
        "ledger": {},
        "versions": versions,
    }
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        tensors = _global_tensors(file, state_dict, model, table)
        temporary.mkdir(parents=True)
        commit(temporary, out, _write(temporary, table, tensors), state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
        raise ConfigError(f"{file}: holds {_kind(loaded)} where a state dict belongs")
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


# ---- what is in it ------------------------------------------------------------------------------------------------


def _global_tensors(
    file: Path, state_dict: dict[str, Any], model: ModelConfig, table: dict[str, Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Check names, shapes and kinds; give (global name, fp32 tensor) one at a time."""

    def read(name: str) -> Tensor:
        tensor = state_dict[name].detach().float()
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{file}: {name} holds values that are not finite in fp32; refused")
        return tensor

    own = {name: row.shape for name, row in table.items()}
    if own.keys() & state_dict.keys():
        _refuse(file, _problems(state_dict, own))
        return ((name, read(name)) for name in table)
    adapter = adapter_for(model)
    rows = list(adapter.tensors(model))
    wanted = {row.name: row.shape for row in rows}
    extra = {
        name for name in state_dict.keys() - wanted.keys() if isinstance(name, str) and BUFFERS.search(name)
    }
    tied = "lm_head.weight" if model.tied and "lm_head.weight" in state_dict else None
    plain = {name: value for name, value in state_dict.items() if name not in extra and name != tied}
    _refuse(file, _problems(plain, wanted))
    if tied:
        embedding = next(row.name for row in rows if row.source == "embed.word.weight")
        problems = _problems({tied: state_dict[tied]}, {tied: wanted[embedding]})
        if not problems and not torch.equal(state_dict[tied].float(), state_dict[embedding].float()):
            problems = [f"{tied} differs from {embedding}, and model.tied = true"]
        _refuse(file, problems)
    return adapter.to_global(model, read)


def _refuse(file: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise ConfigError(
            f"{file}: holds another model than the run file's [model]: {'; '.join(problems[:MOST_PROBLEMS])}{more}"
        )


def _problems(state_dict: Mapping[Any, Any], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List every difference of names, shapes and kinds; touches no element."""
    problems = [f"{name} is missing" for name in wanted if name not in state_dict]
    for name, value in state_dict.items():
        if name not in wanted:
            problems.append(f"{name} is not in this model")
        elif problem := _problem(value, wanted[name]):
            problems.append(f"{name} {problem}")
    return problems


def _problem(value: Any, shape: tuple[int, ...]) -> str | None:
    """Say what keeps a value from being a dense tensor of this shape, or give None."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        return f"is {_kind(value)}"
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return f"is no dense tensor in memory ({value.layout}, {value.device.type})"
    if value.dtype not in DTYPES:
        return f"has dtype {str(value.dtype).removeprefix('torch.')}"
    if tuple(value.shape) != shape:
        return f"has shape {tuple(value.shape)} there and {shape} here"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"repeats {value.untyped_storage().nbytes()} stored bytes"
    return None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


# ---- the step directory -------------------------------------------------------------------------------------------


def _write(
    temporary: Path, table: dict[str, Parameter], tensors: Iterator[tuple[str, Tensor]]
) -> dict[str, Any]:
    """Write one rank file, a tensor at a time; give the index."""
    numbers = {name: number for number, name in enumerate(table)}
    fragments: list[list[int]] = []
    with RankWriter(temporary / "rank_00000.bin") as writer:
        for name, tensor in tensors:
            fragments.append([numbers[name], 0, tensor.numel(), writer.written])
            writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    rank = {
        "file": writer.path.name,
        "bytes": writer.written,
        "tp_rank": 0,
        "tp_size": 1,
        "fragments": fragments,
        "blocks": writer.blocks,
    }
    return index_of(table, [MASTER], [rank])
