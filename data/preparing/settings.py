"""Say how a corpus is prepared, and refuse at once everything that cannot be meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import DataConfigError

# Smaller chunks shuffle better, larger ones cost fewer reads and a shorter manifest (40 bytes a chunk).
DEFAULT_CHUNK_BYTES = 128 << 10
DEFAULT_SHARD_BYTES = 64 << 20
DEFAULT_MIN_CHARS = 32
DEFAULT_TEXT_FIELD = "text"
DEFAULT_NGRAM = 13  # Brown et al. 2020, appendix C: between 8 and 13 words
MIN_NGRAM, MAX_NGRAM = 4, 100
MIN_CHUNK_BYTES = 1 << 10
RULE_PRESETS = ("gopher", "c4")


@dataclass(frozen=True)
class CorpusSettings:
    """Say how documents are cleaned, chosen, split and written.

    ``rules`` names presets, ``filters`` are ``MODULE:FUNCTION`` names, ``decontaminate`` holds test files,
    ``ngram`` counts words. ``workers`` alone has no influence on what is written.
    """

    heldout_fraction: float = 0.01
    tokenizer: Path | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    min_chars: int = DEFAULT_MIN_CHARS
    workers: int = 0
    text_field: str = DEFAULT_TEXT_FIELD
    keep_html: bool = False
    fix_text: bool = False
    rules: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    scrub: bool = False
    near_duplicates: bool = False
    decontaminate: tuple[Path, ...] = ()
    ngram: int = DEFAULT_NGRAM

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant, all in one message."""
        problems = []
        if not 0 <= self.heldout_fraction < 1:
            problems.append(f"heldout_fraction is {self.heldout_fraction}; it must be 0 or more, under 1")
        if not MIN_CHUNK_BYTES <= self.chunk_bytes <= self.shard_bytes:
            problems.append(
                f"chunk_bytes is {self.chunk_bytes} and shard_bytes {self.shard_bytes}; a chunk must be at least "
                f"{MIN_CHUNK_BYTES} bytes and no larger than a shard"
            )
        if self.min_chars < 0 or self.workers < 0:
            problems.append(
                f"min_chars is {self.min_chars} and workers {self.workers}; neither may be negative"
            )
        if not MIN_NGRAM <= self.ngram <= MAX_NGRAM:
            problems.append(f"ngram is {self.ngram}; it must be {MIN_NGRAM} to {MAX_NGRAM} words")
        if not self.text_field:
            problems.append("text_field is empty; name the column or key that holds the text")
        problems += [
            f"rules {name!r} are not known; there are: {', '.join(RULE_PRESETS)}"
            for name in self.rules
            if name not in RULE_PRESETS
        ]
        problems += [
            f"test file {path} to decontaminate from is no file; give text or .jsonl files"
            for path in self.decontaminate
            if not path.is_file()
        ]
        if self.fix_text and find_spec("ftfy") is None:
            problems.append(missing_package("fix_text", "ftfy", "clean"))
        raise_problems(problems)


def missing_package(what: str, package: str, extra: str) -> str:
    """Say which package something needs and how to install it."""
    return f"{what} needs the package {package}, which is not installed; run: pip install 'basestone[{extra}]'"


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one DataConfigError for all problems, a line each; pass where there is none."""
    if problems:
        raise DataConfigError("\n".join(problems))
