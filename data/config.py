"""Declare the ``[data]`` section of a run file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

BUILTIN_PREFIX = "builtin:"
BUILTIN_NAMES = ("builtin:python",)
FIXED: dict[str, Any] = {"on_resume": "fixed"}
FREE: dict[str, Any] = {"on_resume": "free"}


class DataConfig(BaseModel):
    """Say what a run is trained on and measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    train: tuple[str, ...] = Field(
        ...,
        strict=False,  # TOML has lists
        description="Shard directories to train on (each holds a manifest.json), or builtin:python",
        json_schema_extra=FIXED,
    )
    heldout: dict[str, str] = Field(
        default={},
        description="Held-out sets to measure on: a name, and its shard directory or builtin:python",
        json_schema_extra=FREE,
    )
    tokenizer: str = Field(
        ..., description="Path of a SentencePiece model, or builtin:python", json_schema_extra=FIXED
    )
    sequence_length: int = Field(..., description="Tokens predicted in each sequence", json_schema_extra=FIXED)
    workers: int = Field(
        default=1,
        description="Processes that read ahead for each reader; 0 reads in the training process",
        json_schema_extra=FREE,
    )
    mask_document_start: bool = Field(
        default=False,
        description="Give no loss to predicting a document's first token from the end of the one before",
        json_schema_extra=FIXED,
    )

    @field_validator("train", mode="before")
    @classmethod
    def _accept_one_string(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("train")
    @classmethod
    def _check_train(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("got an empty list; give at least one shard directory or builtin:python")
        for place in value:
            _check_place(place)
        repeated = sorted({place for place in value if value.count(place) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} is given more than once; name each directory once")
        return value

    @field_validator("heldout")
    @classmethod
    def _check_heldout(cls, value: dict[str, str]) -> dict[str, str]:
        for name, place in value.items():
            if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
                raise ValueError(f"got the name {name!r}; use letters, digits, '_', '-' and '.'")
            _check_place(place)
        return value

    @field_validator("tokenizer")
    @classmethod
    def _check_tokenizer(cls, value: str) -> str:
        _check_place(value)
        return value

    @field_validator("sequence_length")
    @classmethod
    def _check_sequence_length(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"got {value}; a sequence needs at least 2 tokens")
        return value

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, value: int) -> int:
        if not 0 <= value <= 256:
            raise ValueError(f"got {value}; use 0 (read in the training process) to 256")
        return value


def _check_place(place: str) -> None:
    if not place.strip():
        raise ValueError("got an empty path; give a path or builtin:python")
    if place.startswith(BUILTIN_PREFIX) and place not in BUILTIN_NAMES:
        raise ValueError(f"got {place!r}; the embedded corpora are: {', '.join(BUILTIN_NAMES)}")
