"""The directory that fine-tuning writes: weights, configuration, tokenizer, figures and card; whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...data.errors import DataStorageError
from ...data.storage import make_readable, storage_errors, write_atomic
from ..errors import NumericsError
from ..hub.config_file import read_config
from .directory import LICENCE_FILES, TOKENIZER_FILES, stored_dtype, tuned_config
from .settings import FinetuneSettings
from .tokens import Prepared
from .training import Tuning, load_model, with_adapter

MAX_SHARD = "5GB"


def write_model(
    partial: Path, tuning: Tuning, weights: dict[str, Tensor], settings: FinetuneSettings, prepared: Prepared
) -> None:
    """Write weights, config.json and the tokenizer's own files; with --keep-adapter the adapter instead of weights.

    Weights have the source's dtype.

    Raises:
        NumericsError: a weight is not finite.
        DataStorageError: a full disk.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericsError(f"finetune: {name} is not finite after training; lower --lr")
    source_config = read_config(settings.source)
    with _storage(settings.out):
        if settings.keep_adapter:
            _write_adapter(partial, tuning.model, weights, settings)
        else:
            model, state = tuning.model, weights
            if settings.lora is not None:
                model = merged(weights, settings, prepared)
                state = model.state_dict()
            dtype = getattr(torch, stored_dtype(settings.source))
            state = {name: _cast(tensor, dtype) for name, tensor in state.items()}
            model.save_pretrained(partial, state_dict=state, max_shard_size=MAX_SHARD)
            config = tuned_config(
                source_config,
                architecture=tuning.architecture,
                pad_id=prepared.pad_id,
                labels=prepared.labels,
            )
            write_atomic(partial / "config.json", _json(config))
        (partial / "generation_config.json").unlink(missing_ok=True)
        kept = (*TOKENIZER_FILES, *LICENCE_FILES)
        for name in (*kept, *(() if prepared.labels is not None else ("generation_config.json",))):
            if (settings.source / name).is_file():
                write_atomic(partial / name, (settings.source / name).read_bytes())


def merged(weights: dict[str, Tensor], settings: FinetuneSettings, prepared: Prepared) -> Any:
    """Load the source anew, in fp32, and add the adapter of `weights` to its own weights.

    The model that was trained may be in pieces on several ranks; this one is whole.
    """
    from peft import set_peft_model_state_dict
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # it would cut this one, too
    model = with_adapter(load_model(settings, prepared), settings)
    set_peft_model_state_dict(model, adapter_state(model, weights))
    return model.merge_and_unload()


def adapter_state(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick the adapter's tensors, in fp32, under the names that PEFT saves them by."""
    from peft import get_peft_model_state_dict

    state = {name: tensor.float().cpu() for name, tensor in weights.items()}
    return get_peft_model_state_dict(model, state_dict=state)


def _write_adapter(partial: Path, model: Any, weights: dict[str, Tensor], settings: FinetuneSettings) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in adapter_state(model, weights).items()}
    save_file(state, partial / "adapter_model.safetensors", {"format": "pt"})
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path = str(settings.source.resolve())
    adapter.inference_mode = True
    adapter.save_pretrained(partial)


def finish(partial: Path, out: Path, files: dict[str, bytes]) -> None:
    """Add the last files, and make all durable and readable by others."""
    with _storage(out):
        for name, content in files.items():
            write_atomic(partial / name, content)
        for name in make_readable(partial):
            descriptor = os.open(partial / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _storage(out: Path) -> Iterator[None]:
    try:
        with storage_errors(f"writing {out}"):
            yield
    except SafetensorError as error:
        raise DataStorageError(f"writing {out} failed: {error}; check free space") from error


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
