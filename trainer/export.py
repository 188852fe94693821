"""Export a checkpoint as a Hugging Face directory that is compared with the trainer before it gets its name."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..data.hf_tokenizer import write_hf_tokenizer
from ..data.storage import rename_directory, storage_errors, write_atomic
from ..data.tokenizer import Tokenizer
from ..model.config import ModelConfig
from ..model.hf.adapter import Adapter, LastRead, adapter_for
from ..model.hf.rules import HFTensor
from ..model.hf.safetensors_file import write_safetensors
from ..model.layout import decoder_layout
from .card import CardFacts, Verification, model_card
from .errors import EXIT_NUMERICS, BasestoneError, ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANDOM_POSITIONS = 128
"""Positions of the random sequence that every verification adds to the samples."""


class ExportError(BasestoneError, ValueError):
    """Report an export that would not be right; nothing is left behind."""

    exit_code = EXIT_NUMERICS


class WeightSource(Protocol):
    """Where the weights come from: whole global fp32 tensors by name, with the padded vocabulary."""

    def names(self) -> Iterable[str]:
        """List the global names."""

    def read(self, name: str) -> torch.Tensor:
        """Give one whole tensor in fp32."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote. `verification` is None where no reference was given."""

    path: Path
    files: tuple[str, ...]
    num_tensors: int
    total_bytes: int
    dtype: str
    verification: Verification | None


def export_checkpoint(
    source: WeightSource,
    config: ModelConfig,
    tokenizer: Path,
    out: Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    max_shard_bytes: int = 5_000_000_000,
    facts: CardFacts,
    sequence_length: int,
    reference: Callable[[torch.Tensor], torch.Tensor] | None,
    samples: torch.Tensor | None,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write weights, configuration, tokenizer and card into `out`, which must not exist yet.

    Everything is written beside `out` under a temporary name, verified, and renamed. Memory holds the largest
    parameter, plus the whole model in fp32 while it is verified.

    `reference` maps int64 ids [batch, sequence] to the trainer's fp32 logits [batch, sequence, true vocabulary],
    of weights rounded to `dtype`; None leaves the export unverified. `samples` are held-out ids
    [batch, sequence]; one random sequence is always added. `sequence_length` is the longest that the model was
    trained on.

    Raises ConfigError (an existing `out`, a missing package, a tokenizer that does not belong to the model),
    AdapterError (a model that the Hugging Face class cannot hold), ExportError (weights that are missing or
    not finite, logits that differ by more than `tolerance`), DataStorageError (a full disk).
    """
    adapter = adapter_for(config)
    tokens = Tokenizer(tokenizer)
    _check_before(source, config, tokens, out, verify=reference is not None)
    with storage_errors(f"writing the export {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        with storage_errors(f"writing the export {out}"):
            tensors = list(adapter.tensors(config))
            total_bytes = _write_weights(source, adapter, tensors, partial, DTYPES[dtype], max_shard_bytes)
            _write_configs(adapter, config, tokens, partial, DTYPES[dtype])
            write_hf_tokenizer(tokenizer, partial, model_max_length=sequence_length)
        verification = None
        if reference is not None:
            batches = [_random_ids(config, sequence_length)] + ([] if samples is None else [samples])
            verification = _verify(partial, reference, batches, tolerance)
        with storage_errors(f"writing the export {out}"):
            card = model_card(config, facts, dtype=dtype, verification=verification)
            write_atomic(partial / "README.md", card.encode())
            files = _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where the export got its name
    return ExportReport(out, files, len(tensors), total_bytes, dtype, verification)


def _check_before(
    source: WeightSource, config: ModelConfig, tokens: Tokenizer, out: Path, *, verify: bool
) -> None:
    """Refuse what can be refused before anything is read or written."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"export: {out} exists already; remove it or name another directory")
    if config.vocab_size is None or tokens.vocab_size > config.vocab_size:
        raise ConfigError(
            f"export: the tokenizer {tokens.path} has {tokens.vocab_size} pieces and the model a vocabulary of "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )
    if verify and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "export: verification needs transformers; `pip install 'basestone[hf]'`, or export with --no-verify"
        )
    missing = sorted(set(decoder_layout(config)) - set(source.names()))
    if missing:
        raise ExportError(
            f"export: the checkpoint lacks {len(missing)} of the model's parameters, the first {missing[0]}; "
            "the checkpoint and its configuration do not belong together"
        )


def _write_weights(
    source: WeightSource,
    adapter: Adapter,
    tensors: list[HFTensor],
    out: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> int:
    """Write the tensors one after another; give their bytes."""
    by_name = {tensor.name: tensor for tensor in tensors}
    read = LastRead(source.read)

    def produce(name: str) -> torch.Tensor:
        rounded = adapter.read(by_name[name], read).to(dtype)
        if not torch.isfinite(rounded).all():
            raise ExportError(
                f"export: {name} is not finite in {str(dtype).removeprefix('torch.')}; "
                "export an earlier checkpoint, or with dtype bf16 or fp32"
            )
        return rounded

    plan = [(tensor.name, tensor.shape, dtype) for tensor in tensors]
    return write_safetensors(out, plan, produce, max_shard_bytes).total_bytes


def _write_configs(
    adapter: Adapter, config: ModelConfig, tokens: Tokenizer, out: Path, dtype: torch.dtype
) -> None:
    specials = {"bos": tokens.bos, "eos": tokens.eos, "pad": tokens.pad}
    generation = {"_from_model_config": True, **{f"{name}_token_id": value for name, value in specials.items()}}
    for name, values in (
        ("config.json", adapter.hf_config(config, dtype=dtype, **specials)),
        ("generation_config.json", generation),
    ):
        write_atomic(out / name, (json.dumps(values, indent=2) + "\n").encode())


def _random_ids(config: ModelConfig, sequence_length: int) -> torch.Tensor:
    assert config.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, min(sequence_length, RANDOM_POSITIONS)), generator=generator)


def _verify(
    directory: Path,
    reference: Callable[[torch.Tensor], torch.Tensor],
    batches: list[torch.Tensor],
    tolerance: float,
) -> Verification:
    """Load the directory from disk in fp32 and compare its logits with the reference's, batch by batch."""
    model = _load_from_disk(directory)
    differences, sizes = [], []
    for ids in batches:
        with torch.no_grad():
            got = model(input_ids=ids, use_cache=False).logits.float()
            expected = reference(ids).detach().to("cpu", torch.float32)
        if got.shape != expected.shape:
            raise ExportError(
                f"export: the exported model gives logits of shape {tuple(got.shape)} and the trainer's of "
                f"{tuple(expected.shape)}; nothing was exported"
            )
        differences.append((got - expected).abs().max())
        sizes.append(expected.abs().max())
    # torch's max keeps a NaN, which Python's would drop
    difference, largest = torch.stack(differences).max().item(), torch.stack(sizes).max().item()
    error = difference / largest if largest > 0 else math.inf
    if not error <= tolerance:
        raise ExportError(
            f"export: the exported model's logits differ from the trainer's by {error:.3e} relative "
            f"({difference:.3e} of {largest:.3e}), more than {tolerance:.1e}; nothing was exported"
        )
    num_positions = sum(ids.numel() for ids in batches)
    return Verification(error, difference, num_positions, tolerance)


def _load_from_disk(directory: Path) -> Any:
    """Load as any client would; refuse a directory that transformers would complete with random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    show_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    finally:
        if show_bars:
            logging.enable_progress_bar()
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ExportError(f"export: transformers does not take the exported weights as they are: {wrong}")
    return model.eval()


def _publish(partial: Path, out: Path) -> tuple[str, ...]:
    """Give the finished directory its name, readable by others; list its files."""
    for path in partial.iterdir():
        path.chmod(0o644)
    partial.chmod(0o755)
    if out.exists() or out.is_symlink():  # made by somebody else meanwhile
        raise ConfigError(f"export: {out} exists already; remove it or name another directory")
    rename_directory(partial, out)
    return tuple(sorted(path.name for path in out.iterdir()))
