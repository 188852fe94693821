"""Hugging Face adapters: one table per family, read in both directions.

Files follow the layout that the Hugging Face hub has used since transformers 4, so that version 4, version 5
and other readers of these directories agree on them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import ValidationError

from ..bert import hf as bert
from ..config import ModelConfig
from ..embedding.hf import POOLING_MODES, trunk_rows
from ..families import layout_of
from ..layout import Parameter
from ..t5 import hf as t5
from . import gpt2, llama, mistral, qwen2, qwen3
from .rules import AdapterError, HFTensor, Row, differences

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Adapter:
    """A family's way to and from Hugging Face.

    `layout` gives the parameters of a model by their global names, and `rows` says how they are spelt there.
    `needed` gives what fields of a model must be for the class to hold it. `hf_fields` and `model_fields` turn a model
    into the fields of config.json, and those into a model's; the latter raises AdapterError, or KeyError for a field
    that is missing. `inputs` spells the fields of a batch, and `outputs` are the class's logits in the order of ours;
    `framing` says what a tokenizer puts around a text, `pipeline_tag` what the hub calls its use; `options` are what
    the class is loaded with; `trunks` name its lists of layers where there are two.
    """

    family: str
    model_type: str
    architecture: str
    layout: Callable[[ModelConfig], dict[str, Parameter]]
    rows: Callable[[ModelConfig], list[Row]]
    needed: Callable[[ModelConfig], dict[str, object]]
    hf_fields: Callable[[ModelConfig], dict[str, Any]]
    model_fields: Callable[[dict[str, Any]], dict[str, Any]]
    inputs: Mapping[str, str] = field(default_factory=lambda: {"tokens": "input_ids"})
    outputs: tuple[str, ...] = ("logits",)
    framing: Literal["document", "sentences", "texts", "spans"] = "document"
    pipeline_tag: str = "text-generation"
    options: Mapping[str, Any] = field(default_factory=dict)
    trunks: tuple[str, ...] = ()

    def problems(self, config: ModelConfig) -> list[str]:
        """Name every field of a model that its class cannot hold."""
        needed = {"pooling": None, **self.needed(config)}
        return differences({name: getattr(config, name) for name in needed}, needed)

    def tensors(self, config: ModelConfig) -> Iterator[HFTensor]:
        """List the directory's tensors; those of one global parameter follow one another."""
        shapes = {name: parameter.shape for name, parameter in self.layout(config).items()}
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
            **({"decoder_start_token_id": pad} if self.framing == "spans" else {}),
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
        try:
            return ModelConfig.model_validate({"family": self.family, **fields})
        except ValidationError as error:
            reasons = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'model'}: {one['msg'].removeprefix('Value error, ')}"
                for one in error.errors(include_url=False)
            )
            raise AdapterError(f"config.json describes no model of family {self.family}: {reasons}") from None


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


def _of_module(family: str, module: ModuleType) -> Adapter:
    return Adapter(
        family,
        module.MODEL_TYPE,
        module.ARCHITECTURE,
        layout_of,
        module.rows,
        module.needed,
        module.hf_fields,
        module.model_fields,
    )


def _bert(architecture: str) -> Adapter:
    return Adapter(
        "bert",
        bert.MODEL_TYPE,
        architecture,
        layout_of,
        bert.rows,
        functools.partial(bert.needed, architecture=architecture),
        bert.hf_fields,
        functools.partial(bert.model_fields, architecture=architecture),
        inputs=bert.INPUTS,
        outputs=bert.OUTPUTS[architecture],
        framing="sentences",
        pipeline_tag="fill-mask",
    )


def _of_sentences(head: Adapter, architecture: str, **more: Any) -> Adapter:
    """Make the adapter of a trunk with pooling out of that of the class with a head."""
    return replace(
        head,
        architecture=architecture,
        rows=lambda config: trunk_rows(head.rows(config), config),
        needed=lambda config: {**head.needed(config), "pooling": tuple(POOLING_MODES)},
        model_fields=lambda hf: {**head.model_fields(hf), "pooling": hf.get("pooling", "mean")},
        outputs=("last_hidden_state",),
        pipeline_tag="sentence-similarity",
        **more,
    )


_HEADS = [
    *itertools.starmap(
        _of_module,
        (("llama", llama), ("mistral", mistral), ("qwen2", qwen2), ("qwen3", qwen3), ("gpt2", gpt2)),
    ),
    *map(_bert, bert.OUTPUTS),
    replace(
        _of_module("t5", t5),
        inputs=t5.INPUTS,
        trunks=t5.TRUNKS,
        framing="spans",
        pipeline_tag="text2text-generation",
    ),
]
_TRUNKS = {
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "Qwen2Model",
    "Qwen3ForCausalLM": "Qwen3Model",
    "GPT2LMHeadModel": "GPT2Model",
}
ADAPTERS = (
    *_HEADS,
    *(
        _of_sentences(head, _TRUNKS[head.architecture], framing="texts")
        for head in _HEADS
        if head.architecture in _TRUNKS
    ),
    _of_sentences(_bert(bert.MASKED_LM), "BertModel", options={"add_pooling_layer": False}),
)


def adapter_for(config: ModelConfig) -> Adapter:
    """Give the adapter of the model's family; raises AdapterError where its class cannot hold the model."""
    candidates = [adapter for adapter in ADAPTERS if adapter.family == config.family]
    adapter = next((one for one in candidates if not one.problems(config)), candidates[0])
    if problems := adapter.problems(config):
        able = [other.family for other in ADAPTERS if not other.problems(config)]
        advice = f"family {' or '.join(able)} can" if able else "no family's class can; change these fields"
        raise AdapterError(f"{adapter.architecture} cannot hold this model: {'; '.join(problems)}; {advice}")
    return adapter


def adapter_for_hf(hf_config: dict[str, Any]) -> Adapter:
    """Give the adapter for a config.json by its model_type and, where several classes have it, its architecture.

    Raises AdapterError for a type that has none.
    """
    model_type, architectures = hf_config.get("model_type"), hf_config.get("architectures") or []
    candidates = [adapter for adapter in ADAPTERS if adapter.model_type == model_type]
    if "pooling" in hf_config:
        candidates = [adapter for adapter in candidates if adapter.pipeline_tag == "sentence-similarity"]
    if candidates:
        return next((one for one in candidates if one.architecture in architectures), candidates[0])
    known = ", ".join(dict.fromkeys(adapter.model_type for adapter in ADAPTERS))
    raise AdapterError(f"config.json has model_type {model_type!r}; this package can read {known}")
