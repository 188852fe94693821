"""Declare the ``[data]`` and ``[reading]`` sections of a run file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .division import MAX_LANES, USUAL_LANES

BUILTIN_PREFIX = "builtin:"
BUILTIN_NAMES = ("builtin:python",)
FIXED: dict[str, Any] = {"on_resume": "fixed"}
FREE: dict[str, Any] = {"on_resume": "free"}


def _check_place(place: str) -> None:
    if not place.strip():
        raise ValueError("got an empty path; give a path or builtin:python")
    if place.startswith(BUILTIN_PREFIX) and place not in BUILTIN_NAMES:
        raise ValueError(f"got {place!r}; the embedded corpora are: {', '.join(BUILTIN_NAMES)}")


def _check_places(places: tuple[str, ...]) -> tuple[str, ...]:
    if not places:
        raise ValueError("got an empty list; give at least one shard directory or builtin:python")
    for place in places:
        _check_place(place)
    repeated = sorted({place for place in places if places.count(place) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is given more than once; name each directory once")
    return places


def _as_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# one or several places, each once; TOML has lists
Places = Annotated[
    tuple[str, ...], Field(strict=False), BeforeValidator(_as_several), AfterValidator(_check_places)
]


class Section(BaseModel):
    """Base of the tables here: immutable; an unknown key is an error, and so is `true` or "8" for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SourceConfig(Section):
    """A source of the mix: its shards, and how much of the run it gets."""

    path: Places
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class MixPhase(Section):
    """A row of `data.mix`: weights by source, and the step or the number of tokens at which they end."""

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    until_step: int | None = Field(default=None, gt=0)
    until_tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_end(self) -> MixPhase:
        if (self.until_step is None) == (self.until_tokens is None):
            raise ValueError("needs one of until_step and until_tokens")
        if not any(self.weights.values()):
            raise ValueError("gives every source the weight 0; give one more")
        return self


class DataConfig(Section):
    """Say what a run is trained on and measured on."""

    train: Places | None = Field(
        default=None,
        description="Shards to train on: directories (each with a manifest.json), .tar files, Megatron .bin files, "
        "at a path or URL, or builtin:python",
        json_schema_extra=FREE,  # known by their content: see the state of the stream
    )
    sources: dict[str, SourceConfig] = Field(
        default={},
        validate_default=True,
        description="In place of `train`, several sources by name: `path`, and `weight` or `epochs`, else by size",
        json_schema_extra=FREE,
    )
    temperature: float | None = Field(
        default=None,
        ge=0.1,
        allow_inf_nan=False,
        description="Mix by size to the power 1 / temperature: 1 is by size, larger evens out",
        json_schema_extra=FREE,
    )
    mix: tuple[MixPhase, ...] = Field(
        default=(),
        strict=False,
        description="Rows of `weights` by source, each `until_step` or `until_tokens`; then the sources' own hold",
        json_schema_extra=FREE,
    )
    heldout: dict[str, str] = Field(
        default={},
        description="Held-out sets to measure on: a name, and its shards or builtin:python",
        json_schema_extra=FREE,
    )
    tokenizer: str = Field(
        ...,
        description="A SentencePiece model, a tokenizer.json or its directory, a tiktoken file, or builtin:python",
        json_schema_extra=FIXED,
    )
    sequence_length: int = Field(..., description="Tokens predicted in each sequence", json_schema_extra=FIXED)
    packing: Literal["split", "best_fit"] = Field(
        default="split",
        description="Documents end to end, cut anywhere; or whole into the sequence where they fit best",
        json_schema_extra=FIXED,
    )
    attention: Literal["sequence", "document"] = Field(
        default="sequence",
        description="What a token sees: all before it in its sequence, or of its own document only",
        json_schema_extra=FIXED,
    )
    mask_document_start: bool = Field(
        default=False,
        description="Give no loss to predicting a document's first token from the end of the one before",
        json_schema_extra=FIXED,
    )
    lanes: int | None = Field(
        default=None,
        gt=0,
        le=MAX_LANES,
        description="Streams that the data is dealt into: the most data-parallel ranks that it can feed; by default "
        f"the largest divisor of the global batch up to {USUAL_LANES}",
        json_schema_extra=FIXED,
    )
    workers: int = Field(
        default=1,
        description="Processes that read ahead for each reader; 0 reads in the training process",
        json_schema_extra=FREE,
    )

    @property
    def places(self) -> tuple[str, ...]:
        """Return every place to train on, whichever way they are named."""
        return self.train or tuple(place for source in self.sources.values() for place in source.path)

    @field_validator("heldout")
    @classmethod
    def _check_heldout(cls, value: dict[str, str]) -> dict[str, str]:
        for name, place in value.items():
            _check_name(name)
            _check_place(place)
        return value

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, value: dict[str, SourceConfig], info: ValidationInfo) -> dict[str, SourceConfig]:
        if "train" in info.data and bool(info.data["train"]) == bool(value):
            got = "is given beside train" if value else "is missing, and so is train"
            raise ValueError(f"{got}; give train, a list of shards, or sources, by name")
        for name in value:
            _check_name(name)
        for key in ("weight", "epochs"):
            given = [name for name, source in value.items() if getattr(source, key) is not None]
            if given and len(given) < len(value):
                raise ValueError(
                    f"{', '.join(given)} has {key}, {', '.join(sorted(set(value) - set(given)))} not; "
                    "give it to all or to none"
                )
            if key == "weight" and given and not any(value[name].weight for name in given):
                raise ValueError("every source has the weight 0; give one more")
        if any(source.weight is not None and source.epochs is not None for source in value.values()):
            raise ValueError("weight and epochs are both given; one of them decides the mix")
        return value

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float | None, info: ValidationInfo) -> float | None:
        sources = info.data.get("sources", {}).values()
        if value is not None and any(
            source.weight is not None or source.epochs is not None for source in sources
        ):
            raise ValueError("mixes by size, and the sources have weight or epochs; take one of them out")
        return value

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, value: tuple[MixPhase, ...], info: ValidationInfo) -> tuple[MixPhase, ...]:
        names = set(info.data.get("sources", {}))
        for phase in value if "sources" in info.data else ():
            if unknown := sorted(set(phase.weights) - names):
                known = ", ".join(sorted(names)) or "none"
                raise ValueError(f"names {', '.join(unknown)}; the sources are: {known}")
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


class ReadingConfig(Section):
    """Say how shards are read, and what happens where they cannot be."""

    attempts: int = Field(
        default=5, gt=0, le=100, description="Tries of a read that may succeed later", json_schema_extra=FREE
    )
    timeout_s: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="Longest wait for a server", json_schema_extra=FREE
    )
    threads: int = Field(
        default=8,
        gt=0,
        le=256,
        description="Reads over a network at once, in each worker",
        json_schema_extra=FREE,
    )
    on_bad_chunk: Literal["raise", "quarantine"] = Field(
        default="raise",
        description="Stop at a chunk that is damaged or cannot be read, or pass over it and keep a record",
        json_schema_extra=FREE,
    )
    max_bad_fraction: float = Field(
        default=0.001,
        ge=0,
        lt=1,
        description="Stop once more than this part of the bytes is in quarantine",
        json_schema_extra=FREE,
    )
    cache: str | None = Field(
        default=None,
        description="Directory on a local disk for chunks that came over a network",
        json_schema_extra=FREE,
    )
    cache_gib: float = Field(
        default=32.0, gt=0, allow_inf_nan=False, description="Most that the cache takes", json_schema_extra=FREE
    )
    allow_pipe: bool = Field(
        default=False, description="Let places of the form pipe:COMMAND run commands", json_schema_extra=FREE
    )


def _check_name(name: str) -> None:
    if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
        raise ValueError(f"got the name {name!r}; use letters, digits, '_', '-' and '.'")
