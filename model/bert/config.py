"""BERT's own keys of `[model]`, its style and its published sizes (Devlin et al. 2019, section 3). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from ..config import ModelConfig  # which is made of this


class BertKeys(BaseModel):
    """Keys that the `bert` family adds."""

    num_segments: int = Field(
        0,
        ge=0,
        description="bert: segments, each with an embedding",
        json_schema_extra={"on_resume": "fixed"},
    )
    next_sentence: bool = Field(
        False,
        description="bert: a head that tells whether a second sentence follows the first; false in RoBERTa's style",
        json_schema_extra={"on_resume": "fixed"},
    )

    def bert_problems(self, family: str, style: Mapping[str, Any]) -> list[str]:
        """Say which keys do not go with a family."""
        given = [name for name in BertKeys.model_fields if getattr(self, name)]
        if "num_segments" in style:
            return [] if self.num_segments else [f"num_segments = 0: a {family.upper()} has 1 at least"]
        if not given:
            return []
        return [f"{', '.join(given)}: for family 'bert' alone, got {family!r}; take them out"]


STYLE: dict[str, Any] = {
    "normalization": "layernorm",
    "norm_position": "post",
    "activation": "gelu_erf",
    "position": "learned",
    "bias": True,
    "qkv_bias": False,
    "qk_norm": False,
    "tied": True,
    "num_segments": 2,
    "next_sentence": True,
    "norm_epsilon": 1e-12,
    "dropout": 0.1,
}


def departures(config: ModelConfig) -> list[str]:
    """Name the keys that are something else than the module can be."""
    wrong = [name for name in ("norm_position", "position") if getattr(config, name) != STYLE[name]]
    wrong += [name for name in ("z_loss", "rope_scaling") if getattr(config, name)]
    wrong += [] if config.tied else ["tied"]
    return wrong + (["activation"] if config.gated else [])


def _bert(layers: int, hidden: int, heads: int, sequence: int = 512) -> dict[str, Any]:
    return {
        "family": "bert",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "max_sequence_length": sequence,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
}
