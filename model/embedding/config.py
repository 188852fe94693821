"""Keys of `[model]` that make a trunk of any family an encoder of sentences. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

FIXED: dict[str, Any] = {"on_resume": "fixed"}


class EmbeddingKeys(BaseModel):
    """Keys that make one vector of a text, and no predictions of tokens."""

    pooling: Literal["mean", "cls", "last"] | None = Field(
        None,
        description="sentence embeddings: the mean of a text's tokens, its first one or its last one; by default none",
        json_schema_extra=FIXED,
    )
    temperature: float = Field(
        0.05,
        gt=0,
        description="sentence embeddings: what cosines are divided by in the loss (SimCSE: 0.05)",
        json_schema_extra=FIXED,
    )

    @property
    def texts_per_sample(self) -> int:
        """Count the texts of a sample, which pass through the model side by side: two of a pair."""
        return 1 if self.pooling is None else 2
