"""Export a checkpoint as a Hugging Face directory that is compared with the trainer before it gets its name."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ...data.hf_tokenizer import write_hf_tokenizer
from ...data.storage import make_readable, new_directory, storage_errors, write_atomic
from ...data.tokenizer import Tokenizer
from ...model.config import ModelConfig
from ...model.embedding.hf import sentence_files
from ...model.families import layout_of
from ...model.hf.adapter import Adapter, adapter_for
from ...model.hf.rules import HFTensor
from ..errors import ConfigError
from ..reference import Trace
from .card import CardFacts, Verification, model_card
from .compare import verify
from .weights import ConversionError, WeightSource, write_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANDOM_POSITIONS = 128  # of the random sequence that every verification adds to the samples
SPARE_BYTES = 64 << 20  # of the disk, for what comes with the weights


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
    num_processes: int = 1,
    facts: CardFacts,
    sequence_length: int,
    trace: Trace | None,
    samples: Mapping[str, torch.Tensor] | None,
    tolerance: float = 1e-4,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write weights, configuration, tokenizer and card into `out`, which must not exist yet.

    Everything is written beside `out` under a temporary name, verified, and renamed. Memory holds a few parameters,
    plus the whole model in fp32 while it is verified, where the host has room for it.

    Args:
        num_processes: that write weights; each takes whole files.
        sequence_length: the longest that the model was trained on.
        trace: what the trainer makes of ids, rounded to `dtype`; asked for behind the weights. None: not verified.
        samples: held-out fields [batch, sequence]; one random sequence is always added.
        tell: is told (bytes written, bytes in all) after every tensor.

    Raises:
        ConfigError: an `out` that exists, a missing package, too little space, a tokenizer that does not belong to the
            model.
        AdapterError: a model that the Hugging Face class cannot hold.
        ConversionError: weights that are missing or not finite, logits that differ by more than `tolerance`.
        DataStorageError: a full disk.
    """
    adapter, tokens = adapter_for(config), Tokenizer(tokenizer)
    _check_before(source, config, tokens, out, verify=trace is not None)
    tensors = list(adapter.tensors(config))
    with new_directory(out) as partial:
        with storage_errors(f"writing {out}"):
            _check_space(out, tensors, DTYPES[dtype])
            num_bytes = write_weights(
                source,
                adapter,
                config,
                partial,
                dtype=DTYPES[dtype],
                max_shard_bytes=max_shard_bytes,
                num_processes=num_processes,
                tell=tell,
            )
            _write_configs(adapter, config, tokens, partial, DTYPES[dtype], sequence_length)
        batch = batch_to_compare(adapter, config, samples, sequence_length)
        verified = None
        if trace is not None:
            verified = verify(partial, adapter, config, trace, batch, tolerance, command="export")
        with storage_errors(f"writing {out}"):
            card = model_card(adapter, config, facts, dtype=dtype, verification=verified)
            write_atomic(partial / "README.md", card.encode())
            files = make_readable(partial)
    return ExportReport(out, files, len(tensors), num_bytes, dtype, verified)


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
    if verify:
        check_transformers("export")
    missing = sorted(set(layout_of(config)) - set(source.names()))
    if missing:
        raise ConversionError(
            f"export: the checkpoint lacks {len(missing)} of the model's parameters, the first {missing[0]}; "
            "the checkpoint and its configuration do not belong together"
        )


def check_transformers(command: str) -> None:
    """Refuse to go on where nothing can be verified.

    Raises:
        ConfigError: a package is missing.
    """
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate")):
        raise ConfigError(
            f"{command}: verification needs transformers and accelerate; `pip install 'basestone[hf]'`, or {command} "
            "with --no-verify"
        )


def _check_space(out: Path, tensors: Iterable[HFTensor], dtype: torch.dtype) -> None:
    num_bytes = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    free, needed = shutil.disk_usage(out.parent).free, num_bytes + SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"export: {out} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; free some, or name "
            "another directory"
        )


def _write_configs(
    adapter: Adapter,
    config: ModelConfig,
    tokens: Tokenizer,
    out: Path,
    dtype: torch.dtype,
    sequence_length: int,
) -> None:
    """Write all but the weights and the card."""
    specials = {"bos": tokens.bos, "eos": tokens.eos, "pad": tokens.pad}
    described = adapter.hf_config(config, dtype=dtype, **specials)
    ids = [*(f"{name}_token_id" for name in specials), "decoder_start_token_id"]
    pooled = config.pooling is not None
    sentences = sentence_files(config, sequence_length, adapter.options) if pooled else {}
    generation = {"_from_model_config": True, **{name: described[name] for name in ids if name in described}}
    for name, values in (
        ("config.json", described),
        *([("generation_config.json", generation)] if config.predicts_tokens else []),
        *sentences.items(),
    ):
        (out / name).parent.mkdir(exist_ok=True)
        write_atomic(out / name, (json.dumps(values, indent=2) + "\n").encode())
    write_hf_tokenizer(tokens.path, out, model_max_length=sequence_length, framing=adapter.framing)


def batch_to_compare(
    adapter: Adapter, config: ModelConfig, samples: Mapping[str, torch.Tensor] | None, sequence_length: int
) -> dict[str, torch.Tensor]:
    """Give, by field, samples and a random sequence of their length as one batch."""
    assert config.vocab_size is not None
    highest = {"segments": config.num_segments}  # of all other fields tokens
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for name in adapter.inputs:
        given = (samples or {}).get(name)
        length = given.shape[1] if given is not None else min(sequence_length, RANDOM_POSITIONS)
        if given is None and samples:
            given, length = torch.zeros_like(samples["tokens"]), samples["tokens"].shape[1]
        random = torch.randint(highest.get(name, config.vocab_size), (1, length), generator=generator)
        batch[name] = random if given is None else torch.cat((random, given))
    return batch
