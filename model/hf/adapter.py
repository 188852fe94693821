"""Hugging Face adapters: one table per family, read in both directions.

Files follow the layout that the Hugging Face hub has used since transformers 4, so that version 4, version 5
and other readers of these directories agree on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..config import ModelConfig
from ..layout import decoder_layout
from . import gpt2, llama
from .rules import AdapterError, HFTensor, Row

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Adapter:
    """A family's way to and from Hugging Face."""

    family: str
    model_type: str
    architecture: str
    rows: Callable[[ModelConfig], list[Row]]
    check: Callable[[ModelConfig], None]
    hf_fields: Callable[[ModelConfig], dict[str, Any]]
    model_fields: Callable[[dict[str, Any]], dict[str, Any]]

    def tensors(self, config: ModelConfig) -> Iterator[HFTensor]:
        """List the directory's tensors; those of one global parameter follow one another."""
        shapes = {name: parameter.shape for name, parameter in decoder_layout(config).items()}
        for row in self.rows(config):
            parts = row.rule.split(torch.empty(shapes[row.source], device="meta"))
            for index, (name, part) in enumerate(zip(row.hf_names, parts, strict=True)):
                yield HFTensor(name, tuple(part.shape), row.source, row.rule, index)

    def read(self, hf_tensor: HFTensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make one tensor of the directory out of the global parameter that `read` gives by name.

        The padding of the vocabulary is cut off. The result may be a view. Give `LastRead(read)` to read a
        fused parameter once for all its tensors.
        """
        return hf_tensor.rule.split(read(hf_tensor.source))[hf_tensor.index]

    def to_global(
        self, config: ModelConfig, read_hf: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Give (global name, tensor) for every parameter, out of tensors that `read_hf` gives by their name.

        Padding rows of the vocabulary are zeros. Raises AdapterError where a tensor has another shape.
        """
        shapes = {tensor.name: tensor.shape for tensor in self.tensors(config)}
        for row in self.rows(config):
            parts = [read_hf(name) for name in row.hf_names]
            for name, part in zip(row.hf_names, parts, strict=True):
                if tuple(part.shape) != shapes[name]:
                    raise AdapterError(
                        f"{name} has shape {tuple(part.shape)} where config.json makes it {shapes[name]}; "
                        "the weights and config.json do not belong together"
                    )
            yield row.source, row.rule.join(parts).contiguous()

    def hf_config(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        bos: int | None,
        eos: int | None,
        pad: int | None,
    ) -> dict[str, Any]:
        """Make config.json; the dtype in the spelling of transformers 4 and of transformers 5."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.hf_fields(config),
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "use_cache": True,
            "dtype": DTYPE_NAMES[dtype],
            "torch_dtype": DTYPE_NAMES[dtype],
        }

    def model_config(self, hf_config: dict[str, Any]) -> ModelConfig:
        """Read config.json; raises AdapterError for a model that ours cannot be."""
        try:
            fields = self.model_fields(hf_config)
        except KeyError as error:
            raise AdapterError(f"config.json has no field {error}, which {self.architecture} needs") from None
        return ModelConfig.model_validate({"family": self.family, **fields})


class LastRead:
    """Remember the last tensor read, so that a fused parameter is read once and only one is held."""

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        """Wrap `read`, which gives a tensor by its name."""
        self._read = read
        self._name: str | None = None
        self._tensor: torch.Tensor | None = None

    def __call__(self, name: str) -> torch.Tensor:
        """Give the tensor called `name`."""
        if self._tensor is None or name != self._name:
            self._tensor = None  # let go of the old one before the new one is read
            self._name, self._tensor = name, self._read(name)
        return self._tensor


ADAPTERS = tuple(
    Adapter(
        family,
        module.MODEL_TYPE,
        module.ARCHITECTURE,
        module.rows,
        module.check,
        module.hf_config,
        module.model_fields,
    )
    for family, module in (("llama", llama), ("gpt2", gpt2))
)


def adapter_for(config: ModelConfig) -> Adapter:
    """Give the adapter of the model's family; raises AdapterError where its class cannot hold the model."""
    adapter = next(adapter for adapter in ADAPTERS if adapter.family == config.family)
    adapter.check(config)
    return adapter


def adapter_for_hf(hf_config: dict[str, Any]) -> Adapter:
    """Give the adapter for a config.json by its model_type; raises AdapterError for a type that has none."""
    model_type = hf_config.get("model_type")
    for adapter in ADAPTERS:
        if adapter.model_type == model_type:
            return adapter
    known = ", ".join(adapter.model_type for adapter in ADAPTERS)
    raise AdapterError(f"config.json has model_type {model_type!r}; this package can read {known}")
