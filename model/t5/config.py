"""T5's own keys of `[model]`, its style and its published sizes, those of T5 1.1. Imports no torch.

Sources: Raffel et al. 2020; Shazeer 2020 for the gate; T5 1.1's config.json for the sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from ..config import ModelConfig  # which is made of this


class T5Keys(BaseModel):
    """Keys that the `t5` family adds."""

    num_decoder_layers: int = Field(
        0,
        ge=0,
        description="t5: layers of the decoder, by default as many as num_layers, those of the encoder",
        json_schema_extra={"on_resume": "fixed"},
    )
    relative_buckets: int = Field(
        32,
        ge=4,
        multiple_of=4,
        description="t5: groups of distances between tokens, of which each has a bias in attention",
        json_schema_extra={"on_resume": "fixed"},
    )
    relative_max_distance: int = Field(
        128,
        gt=0,
        description="t5: distances from here on are one group",
        json_schema_extra={"on_resume": "fixed"},
    )

    def t5_problems(self, family: str) -> list[str]:
        """Say which keys do not go with a family, or with one another."""
        if family != "t5":
            given = [name for name, key in T5Keys.model_fields.items() if getattr(self, name) != key.default]
            return (
                [f"{', '.join(given)}: for family 't5' alone, got {family!r}; take them out"] if given else []
            )
        problems = [] if self.num_decoder_layers else ["num_decoder_layers = 0: a T5 has 1 at least"]
        if self.relative_max_distance <= self.relative_buckets // 2:
            problems.append(
                f"relative_max_distance must be above relative_buckets / 2 = {self.relative_buckets // 2}, "
                f"got {self.relative_max_distance}"
            )
        return problems


STYLE: dict[str, Any] = {
    "normalization": "rmsnorm",
    "norm_position": "pre",
    "activation": "geglu",
    "position": "relative",
    "bias": False,
    "qkv_bias": False,
    "qk_norm": False,
    "tied": False,
    "norm_epsilon": 1e-6,
    "dropout": 0.0,  # T5 1.1 was pre-trained without
    "init_std": 1.0,
}


OWN = ("normalization", "norm_position", "position", "bias", "qkv_bias", "qk_norm", "tied")


def departures(config: ModelConfig) -> list[str]:
    """Name the keys that are something else than the module can be."""
    wrong = [name for name in OWN if getattr(config, name) != STYLE[name]]
    wrong += ["num_query_groups"] if config.num_query_groups != config.num_attention_heads else []
    wrong += ["backend"] if config.backend != "torch" else []
    return wrong + (["pooling"] if config.pooling is not None else [])


def _t5(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "family": "t5",
        "num_layers": layers,
        "num_decoder_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": 64,
        "ffn_hidden_size": ffn,
        "max_sequence_length": 512,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "t5-small": _t5(8, 512, 6, 1024),
    "t5-base": _t5(12, 768, 12, 2048),
    "t5-large": _t5(24, 1024, 16, 2816),
    "t5-3b": _t5(24, 2048, 32, 5120),
    "t5-11b": _t5(24, 4096, 64, 10240),
}
