"""Weights from elsewhere as a step directory: compared with the parameter table, then written a tensor at a time."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.families import layout_of
from ..model.hf.adapter import adapter_for
from ..model.layout import Parameter
from .checkpoint.tensors import index_of
from .checkpoint.writer import RankWriter, commit
from .config import RunConfig
from .engine_state import MASTER
from .errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # constants that old versions saved
MOST_PROBLEMS = 20  # to print


def write_step(
    out: Path,
    run: RunConfig,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    imported_from: str,
    tokenizer_sha256: str,
    versions: dict[str, str],
) -> None:
    """Write a step directory with masters and no optimizer state, at step 0.

    Args:
        out: the directory to make; it appears whole or not at all.
        tensors: (global name, fp32 tensor), what `global_tensors` gives.
    """
    table = layout_of(run.model)
    state = {
        "step": 0,
        "tokens": 0,
        "optimizer_steps": 0,
        "imported_from": imported_from,
        "run": run.model_dump(mode="json"),
        "tokenizer_sha256": tokenizer_sha256,
        "ledger": {},
        "versions": versions,
    }
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        commit(temporary, out, _write(temporary, table, tensors), state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def global_tensors(
    origin: Path, state_dict: Mapping[str, Any], model: ModelConfig, asked_by: str
) -> Iterator[tuple[str, Tensor]]:
    """Check names, shapes and kinds; give (global name, fp32 tensor) one at a time.

    Args:
        state_dict: by the names of the family's Hugging Face class, or by our own global ones.
        asked_by: what says which model it should be, for messages.

    Raises:
        ConfigError: it holds another model, every difference in one message; or, on the way, what is not finite.
    """
    table = layout_of(model)

    def read(name: str) -> Tensor:
        tensor = state_dict[name].detach().float()
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{origin}: {name} holds values that are not finite in fp32; refused")
        return tensor

    own = {name: row.shape for name, row in table.items()}
    if 2 * len(own.keys() & state_dict.keys()) > len(own):  # a name or two may be the same on both sides
        _refuse(origin, asked_by, _problems(state_dict, own))
        return ((name, read(name)) for name in table)
    adapter = adapter_for(model)
    rows = list(adapter.tensors(model))
    wanted = {row.name: row.shape for row in rows}
    extra = {
        name for name in state_dict.keys() - wanted.keys() if isinstance(name, str) and BUFFERS.search(name)
    }
    tied = "lm_head.weight" if model.tied and "lm_head.weight" in state_dict else None
    plain = {name: value for name, value in state_dict.items() if name not in extra and name != tied}
    _refuse(origin, asked_by, _problems(plain, wanted))
    if tied:
        embedding = next(row.name for row in rows if row.source == "embed.word.weight")
        problems = _problems({tied: state_dict[tied]}, {tied: wanted[embedding]})
        if not problems and not torch.equal(state_dict[tied].float(), state_dict[embedding].float()):
            problems = [f"{tied} differs from {embedding}, and model.tied = true"]
        _refuse(origin, asked_by, problems)
    return adapter.to_global(model, read)


def _refuse(origin: Path, asked_by: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise ConfigError(
            f"{origin}: holds another model than {asked_by}: {'; '.join(problems[:MOST_PROBLEMS])}{more}"
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
        return f"is {kind_of(value)}"
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return f"is no dense tensor in memory ({value.layout}, {value.device.type})"
    if value.dtype not in DTYPES:
        return f"has dtype {str(value.dtype).removeprefix('torch.')}"
    if tuple(value.shape) != shape:
        return f"has shape {tuple(value.shape)} there and {shape} here"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"repeats {value.untyped_storage().nbytes()} stored bytes"
    return None


def kind_of(value: Any) -> str:
    """Name what a value is where a tensor belongs."""
    return f"a {type(value).__name__}"
