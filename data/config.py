"""Declare the ``[data]``, ``[task]`` and ``[reading]`` sections of a run file."""

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
BUILTIN_CORPUS = "builtin:python"  # with its tokenizer
BUILTIN_PAIRS = "builtin:python-pairs"  # a corpus only
BUILTIN_SYMBOLS = "builtin:python-symbols"  # a tokenizer only
BUILTIN_NAMES = (BUILTIN_CORPUS, BUILTIN_PAIRS)
BUILTIN_TOKENIZERS = (BUILTIN_CORPUS, BUILTIN_SYMBOLS)
FIXED: dict[str, Any] = {"on_resume": "fixed"}
FREE: dict[str, Any] = {"on_resume": "free"}
# what only one task reads
TASK_SETTINGS = {
    "masked": (
        "predicted",
        "masked",
        "replaced",
        "whole_words",
        "max_predictions",
        "next_sentence",
        "short_fraction",
    ),
    "spans": ("noise", "mean_span"),
    "contrastive": ("pairs",),
}


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
        "at a path or URL, or builtin:python or builtin:python-pairs",
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
        description="A SentencePiece model, a tokenizer.json or its directory, a tiktoken file, builtin:python, or "
        "builtin:python-symbols, which has masks and sentinels too",
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
        if value.startswith(BUILTIN_PREFIX) and value not in BUILTIN_TOKENIZERS:
            raise ValueError(f"got {value!r}; the embedded tokenizers are: {', '.join(BUILTIN_TOKENIZERS)}")
        if not value.startswith(BUILTIN_PREFIX):
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


class TaskConfig(Section):
    """Say what is made of the data's tokens, and so what the model learns to predict."""

    name: Literal["causal", "masked", "spans", "contrastive"] | None = Field(
        default=None,
        description="Predict the next token, hidden tokens (BERT), hidden spans (T5), or which texts belong together; "
        "by default what the model is usually trained on",
        json_schema_extra=FIXED,
    )
    predicted: float = Field(
        default=0.15, gt=0, lt=1, description="masked: part of the tokens to predict", json_schema_extra=FIXED
    )
    masked: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="masked: part of these that the mask hides",
        json_schema_extra=FIXED,
    )
    replaced: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="masked: part of these that a random token replaces; the others stay",
        json_schema_extra=FIXED,
    )
    whole_words: bool = Field(
        default=False, description="masked: hide all tokens of a word or none", json_schema_extra=FIXED
    )
    max_predictions: int | None = Field(
        default=None, gt=0, description="masked: most predictions in a sequence", json_schema_extra=FIXED
    )
    next_sentence: bool | None = Field(
        default=None,
        description="masked: sequences are two parts, and whether the second follows the first is predicted too; by "
        "default where the model has a head for it",
        json_schema_extra=FIXED,
    )
    short_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="next_sentence: part of the sequences that aim at a random shorter length",
        json_schema_extra=FIXED,
    )
    noise: float = Field(
        default=0.15, gt=0, lt=1, description="spans: part of the tokens to predict", json_schema_extra=FIXED
    )
    mean_span: float = Field(
        default=3.0, ge=1, description="spans: their mean length in tokens", json_schema_extra=FIXED
    )
    pairs: Literal["dropout", "given", "neighbours"] = Field(
        default="dropout",
        description="contrastive: a passage and itself under another dropout; two texts with U+001F between them in "
        "each document; or two passages that follow one another",
        json_schema_extra=FIXED,
    )

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if self.masked + self.replaced > 1:
            raise ValueError(
                f"masked is {self.masked} and replaced {self.replaced}; together they are at most 1, and the rest stays"
            )
        if self._changed("short_fraction") and self.next_sentence is False:
            raise ValueError(
                "short_fraction is that of sentence pairs; set next_sentence = true, or leave it out"
            )
        if self.name is not None and (problem := self.problem(self.name)):
            raise ValueError(problem)
        return self

    @property
    def parts(self) -> dict[str, str]:
        """Return the parts of the loss, each with the field that says, 0 or 1, which of its predictions count."""
        assert self.name is not None
        first: str = "next_token" if self.name == "causal" else self.name
        parts: dict[str, str] = {first: "real" if self.name == "contrastive" else "weights"}
        return parts | {"next_sentence": "real"} if self.next_sentence else parts

    def problem(self, task: str) -> str | None:
        """Say which settings are changed and are not a task's, None where all fit."""
        if not (found := self.misplaced(task)):
            return None
        return f"{', '.join(found[0])} belongs to the task {found[1]}, and this is {task}; leave it out"

    def misplaced(self, task: str) -> tuple[list[str], str] | None:
        """Give those settings, and whose they are."""
        for name, settings in TASK_SETTINGS.items():
            given = [key for key in settings if self._changed(key)]
            if given and task != name:
                return given, name
        return None

    def _changed(self, key: str) -> bool:
        # not what was given: a run's record of its settings gives them all
        return bool(getattr(self, key) != type(self).model_fields[key].default)


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
