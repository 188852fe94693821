"""What a family is made of: its parameters, its FLOPs and its module, by the name in `model.family`. Imports no torch.

A family of its own shape has a folder here; gpt2, llama and their like are all decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .bert.layout import bert_layout, bert_macs
from .config import ModelConfig
from .layout import Macs, Parameter, decoder_layout, decoder_macs
from .t5.layout import t5_layout, t5_macs


class Family(NamedTuple):
    """One kind of model.

    `layout` makes the table of parameters; `macs` counts the multiply-adds of a forward for one token of the inputs,
    from the lengths of inputs and targets and the share of causal attention's scores that counts; `chunk` is the module
    and class of a stage's chunk; `task` is the name of what it is trained on.
    """

    layout: Callable[[ModelConfig], dict[str, Parameter]]
    macs: Callable[[ModelConfig, int, float, float], Macs]
    chunk: tuple[str, str]
    task: str


DECODER = Family(decoder_layout, decoder_macs, (".decoder", "Decoder"), "causal")
BERT = Family(bert_layout, bert_macs, (".bert.chunk", "Bert"), "masked")
T5 = Family(t5_layout, t5_macs, (".t5.chunk", "T5"), "spans")
WITH_FOLDER = {"bert": BERT, "t5": T5}


def family_of(config: ModelConfig) -> Family:
    """Give what a model's family is made of."""
    return WITH_FOLDER.get(config.family, DECODER)


def task_name(config: ModelConfig) -> str:
    """Give the name of what a model is trained on."""
    return "contrastive" if config.pooling is not None else family_of(config).task


def trained_on(task: str) -> str:
    """Say which models are trained on a task, for messages."""
    if task == "contrastive":
        return "a model with model.pooling"
    families = [f'family = "{name}"' for name, family in WITH_FOLDER.items() if family.task == task]
    return " or ".join(families) or "a decoder"


def layout_of(config: ModelConfig) -> dict[str, Parameter]:
    """Make the table of a model's parameters: global name -> Parameter, in the order of the forward pass."""
    return family_of(config).layout(config)
