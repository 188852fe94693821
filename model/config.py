"""The `[model]` section: the shape of a model and how it is initialised. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .bert.config import BertKeys
from .embedding.config import EmbeddingKeys
from .presets import FAMILIES, PRESETS, SHAPES
from .t5.config import T5Keys

FIXED: dict[str, Any] = {"on_resume": "fixed"}
FREE: dict[str, Any] = {"on_resume": "free"}
GATED = ("swiglu", "geglu")
if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]


class RopeScaling(BaseModel):
    """Llama 3.1's RoPE for sequences longer than those of the first training (Dubey et al. 2024, section 3.2).

    Frequencies that turn less than `low_frequency_factor` times within `original_max_sequence_length` are divided by
    `factor`, those that turn more than `high_frequency_factor` times are kept, and between them the two are mixed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    factor: float = Field(ge=1, description="divides the slow frequencies", json_schema_extra=FIXED)
    low_frequency_factor: float = Field(
        gt=0, description="turns below which a frequency is slow", json_schema_extra=FIXED
    )
    high_frequency_factor: float = Field(
        gt=0, description="turns above which a frequency is kept", json_schema_extra=FIXED
    )
    original_max_sequence_length: int = Field(
        gt=0, description="longest sequence of the first training", json_schema_extra=FIXED
    )

    @model_validator(mode="after")
    def _check_order(self) -> RopeScaling:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor must be above low_frequency_factor ({self.low_frequency_factor:g}), "
                f"got {self.high_frequency_factor:g}"
            )
        return self


class ModelConfig(BertKeys, EmbeddingKeys, T5Keys):
    """A Transformer: a decoder in the style of GPT-2, Llama, Mistral or Qwen, an encoder in that of BERT, or T5's both.

    `preset` names a published size, `family` a style; a field given in the file wins over both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    preset: str | None = Field(
        None, description="a published size by name, e.g. gpt2-124m", json_schema_extra=FREE
    )
    family: FamilyName = Field(
        "llama", description="the style, and the Hugging Face class of an export", json_schema_extra=FIXED
    )
    num_layers: int = Field(
        gt=0, description="Transformer layers; t5: those of the encoder", json_schema_extra=FIXED
    )
    hidden_size: int = Field(gt=0, description="width of the residual stream", json_schema_extra=FIXED)
    num_attention_heads: int = Field(gt=0, description="query heads", json_schema_extra=FIXED)
    num_query_groups: int = Field(
        gt=0, description="key/value heads (grouped-query attention)", json_schema_extra=FIXED
    )
    head_dim: int = Field(gt=0, description="width of one head", json_schema_extra=FIXED)
    ffn_hidden_size: int = Field(gt=0, description="width inside the MLP", json_schema_extra=FIXED)
    max_sequence_length: int = Field(
        gt=0, description="longest sequence the model is made for", json_schema_extra=FIXED
    )
    vocab_size: int | None = Field(
        None,
        gt=0,
        description="true vocabulary; by default the tokenizer's",
        json_schema_extra=FIXED,
    )
    vocab_multiple: int = Field(
        128,
        gt=0,
        description="the embedding's rows are padded to a multiple of this, whatever the layout",
        json_schema_extra=FIXED,
    )
    normalization: Literal["rmsnorm", "layernorm"] = Field(description="norm", json_schema_extra=FIXED)
    norm_position: Literal["pre", "post"] = Field(
        "pre", description="norms before attention and MLP, or behind what they add to", json_schema_extra=FIXED
    )
    activation: Literal["swiglu", "geglu", "gelu", "gelu_erf"] = Field(
        description="MLP activation; gelu is the tanh form of GPT-2, gelu_erf the exact one of BERT",
        json_schema_extra=FIXED,
    )
    position: Literal["rope", "learned", "relative"] = Field(
        description="position encoding; relative is T5's bias in attention", json_schema_extra=FIXED
    )
    bias: bool = Field(description="biases in the linear layers", json_schema_extra=FIXED)
    qkv_bias: bool = Field(
        False, description="biases of queries, keys and values alone (Qwen2)", json_schema_extra=FIXED
    )
    qk_norm: bool = Field(
        False,
        description="RMSNorm over each head of queries and keys, before RoPE (Qwen3)",
        json_schema_extra=FIXED,
    )
    tied: bool = Field(description="the head shares the embedding's weight", json_schema_extra=FIXED)
    rope_base: float = Field(10000.0, gt=0, description="RoPE base frequency", json_schema_extra=FIXED)
    rope_scaling: RopeScaling | None = Field(
        None,
        description="Llama 3.1's RoPE for sequences longer than those of the first training, "
        "as a table [model.rope_scaling]",
        json_schema_extra=FIXED,
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="epsilon of the norms", json_schema_extra=FIXED)
    dropout: float = Field(0.0, ge=0, lt=1, description="hidden and attention dropout", json_schema_extra=FIXED)
    init_std: float = Field(
        0.02,
        gt=0,
        description="std of initial weights; projections into the residual stream get std / sqrt(2 layers); t5: that "
        "of the embedding, from which the others follow by their widths",
        json_schema_extra=FIXED,
    )
    z_loss: float = Field(
        0.0, ge=0, description="weight of the squared log-partition (PaLM: 1e-4)", json_schema_extra=FIXED
    )
    backend: Literal["torch", "te"] = Field(
        "torch",
        description="torch: runs anywhere; te: Transformer Engine, where installed",
        json_schema_extra=FREE,
    )
    compile: bool = Field(
        False, description="torch.compile each layer (the first step takes longer)", json_schema_extra=FREE
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, known in (("preset", PRESETS), ("family", FAMILIES)):
            given = values.get(name)
            if given is not None and (not isinstance(given, str) or given not in known):
                raise ValueError(f"{name}: no {name} is called {given!r}; there are {', '.join(sorted(known))}")
        preset = values.get("preset")
        merged = {**PRESETS.get(str(preset), {}), **values}
        merged = {**FAMILIES.get(merged.get("family", "llama"), {}), **merged}
        return _fill_derived(merged)

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups must divide num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_query_groups}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        problems = self.bert_problems(self.family, FAMILIES[self.family])
        problems += self.t5_problems(self.family) + self._family_problems()
        if problems:
            raise ValueError("; ".join(problems))
        if self.bias and self.qkv_bias:
            raise ValueError(
                "qkv_bias = true is for models without other biases; with bias = true, queries, keys and values "
                "have theirs: set qkv_bias to false"
            )
        if self.qk_norm and self.normalization != "rmsnorm":
            raise ValueError(
                "qk_norm = true is an RMSNorm and goes with normalization = 'rmsnorm' alone, "
                f"got {self.normalization!r}; set either"
            )
        return self

    @model_validator(mode="after")
    def _check_scaling(self) -> ModelConfig:
        if (scaling := self.rope_scaling) is None:
            return self
        if self.position != "rope":
            raise ValueError(
                f"rope_scaling needs position = 'rope', got {self.position!r}; take it out, or change the position"
            )
        if scaling.original_max_sequence_length > self.max_sequence_length:
            raise ValueError(
                f"rope_scaling.original_max_sequence_length = {scaling.original_max_sequence_length} exceeds "
                f"max_sequence_length = {self.max_sequence_length}; to train on shorter sequences, "
                "lower data.sequence_length instead"
            )
        return self

    def _family_problems(self) -> list[str]:
        """Say where a model departs from what the module of its family can be."""
        if self.family not in SHAPES:
            return [
                f"{name} = {value!r} is for family {family!r}; take it out"
                for name, value, family in (("norm_position", "post", "bert"), ("position", "relative", "t5"))
                if getattr(self, name) == value
            ]
        wrong = SHAPES[self.family].departures(self)
        return [f"{', '.join(wrong)} cannot be set so in family {self.family!r}; take it out"] if wrong else []

    @property
    def predicts_tokens(self) -> bool:
        """Tell whether there is a head that predicts tokens."""
        return self.pooling is None

    @property
    def tied_head(self) -> bool:
        """Tell whether there is a head that shares the embedding's weight."""
        return self.tied and self.predicts_tokens

    @property
    def causal(self) -> bool:
        """Tell whether all that a token sees are those before it."""
        return self.family not in SHAPES

    @property
    def total_layers(self) -> int:
        """Layers of all trunks, which a pipeline cuts in the order of the forward pass."""
        return self.num_layers + self.num_decoder_layers

    @property
    def gated(self) -> bool:
        """Tell whether the MLP has a gate."""
        return self.activation in GATED

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to `vocab_multiple`, the same in every layout."""
        assert self.vocab_size is not None, "the vocabulary is known only after RunConfig.resolve"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def layout_problems(self, tensor_parallel: int) -> list[str]:
        """Say everything that forbids `tensor_parallel` ranks for this shape; an empty list when it is legal."""
        tp, problems = tensor_parallel, []
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            value = getattr(self, name)
            if value % tp:
                legal = [t for t in range(1, min(value, 64) + 1) if value % t == 0]
                problems.append(
                    f"parallel.tensor = {tp} does not divide model.{name} = {value}; legal values: {legal}"
                )
        if self.vocab_size is not None and self.padded_vocab_size % tp:
            problems.append(
                f"parallel.tensor = {tp} does not divide the padded vocabulary {self.padded_vocab_size}; "
                f"set model.vocab_multiple to a multiple of {tp}"
            )
        return problems


def _fill_derived(values: dict[str, Any]) -> dict[str, Any]:
    """Fill what follows from the other sizes: groups from heads, head_dim from the width, the usual MLP width."""
    filled = dict(values)
    hidden, heads = filled.get("hidden_size"), filled.get("num_attention_heads")
    if filled.get("family") == "t5" and isinstance(layers := filled.get("num_layers"), int):
        filled.setdefault("num_decoder_layers", layers)
    if isinstance(heads, int):
        filled.setdefault("num_query_groups", heads)
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if "head_dim" not in filled and hidden % heads:
            raise ValueError(
                f"num_attention_heads = {heads} does not divide hidden_size = {hidden}; "
                "choose heads that divide it or give head_dim"
            )
        filled.setdefault("head_dim", hidden // heads)
    if isinstance(hidden, int) and "ffn_hidden_size" not in filled:
        gated = filled.get("activation") in GATED
        # Llama keeps the parameter count of a 4h MLP over three matrices: 8h/3, rounded up to 64.
        filled["ffn_hidden_size"] = -(-8 * hidden // 3 // 64) * 64 if gated else 4 * hidden
    return filled
