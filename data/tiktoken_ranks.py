"""Read tiktoken's files of ranks, and complete them: a file holds neither the pattern nor the specials.

The patterns are those of GPT-2, cl100k and o200k as their published encodings split text, in the form that both
tiktoken and Hugging Face's `tokenizers` read alike (no possessive quantifiers).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataConfigError

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|\Z)")
END_OF_TEXT = "<|endoftext|>"
MAX_VOCABULARY = 1 << 24  # tables of this size are made of it

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Preset:
    """Hold a published way to split text, and the specials that belong to a file of ``num_ranks``."""

    pattern: str
    num_ranks: int
    specials: dict[str, int]


PRESETS = {
    "gpt2": Preset(_GPT2, 50256, {END_OF_TEXT: 50256}),
    "r50k_base": Preset(_GPT2, 50256, {END_OF_TEXT: 50256}),
    "p50k_base": Preset(_GPT2, 50280, {END_OF_TEXT: 50256}),
    "cl100k_base": Preset(
        _CL100K,
        100256,
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": Preset(_O200K, 199998, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


def is_rank_file(path: Path, content: bytes) -> bool:
    """Tell whether a file is tiktoken's by its name or its first line."""
    return path.suffix == ".tiktoken" or RANK_LINE.match(content) is not None


def parse_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Return the rank of each token's bytes. Raises DataConfigError for a line or a set that is no tokenizer."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataConfigError(
                f"tokenizer {path}, line {number}: {line[:40]!r} is no `BASE64 RANK`; give a file of tiktoken ranks"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        problem = f"byte {missing[0]} has no rank"
    elif len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        problem = "a rank is given twice or below 0"
    elif max(ranks.values()) >= MAX_VOCABULARY:
        problem = f"rank {max(ranks.values())} is not below {MAX_VOCABULARY:,}"
    else:
        return ranks
    raise DataConfigError(f"tokenizer {path}: {problem}; the file is cut, damaged or no tokenizer")


def complete_ranks(ranks: dict[bytes, int], path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return ``pattern``, ``specials`` (name to id), ``bos`` and ``eos`` from a preset and what is given beside it.

    The preset is named by ``given["preset"]`` or by the file's own name. Its special ids hold for a file of its size;
    in another size <|endoftext|> takes the next free id. Bos and eos of a preset are <|endoftext|>.

    Raises DataConfigError where there is no pattern, or an id is taken.
    """
    name = given.get("preset", path.stem if path.stem in PRESETS else None)
    if name is not None and name not in PRESETS:
        raise DataConfigError(f"tokenizer {path}: no preset is called {name!r}; there are {', '.join(PRESETS)}")
    settings = {key: value for key, value in given.items() if key != "preset"}
    if name is None and "pattern" not in settings:
        raise DataConfigError(
            f'tokenizer {path} says not how text is split; write preset = "NAME" ({", ".join(PRESETS)}) or '
            f"pattern = '...' into {path.name}.toml beside it"
        )
    if name is not None:
        preset = PRESETS[name]
        free = max(ranks.values()) + 1
        fitting = preset.specials if len(ranks) == preset.num_ranks else {END_OF_TEXT: free}
        settings = {"pattern": preset.pattern, "specials": fitting, **settings}
        if END_OF_TEXT in settings["specials"]:
            settings = {"bos": END_OF_TEXT, "eos": END_OF_TEXT, **settings}
    check_specials(settings.setdefault("specials", {}), ranks, path)
    return settings


def check_specials(specials: dict[str, Any], ranks: dict[bytes, int], path: Path) -> None:
    """Raise DataConfigError where the id of a special is taken or none."""
    taken = {rank: token for token, rank in ranks.items()}
    for special, number in specials.items():
        if not isinstance(number, int) or not 0 <= number < MAX_VOCABULARY or number in taken or not special:
            raise DataConfigError(
                f"tokenizer {path}: special {special!r} has id {number!r}, which is taken or no id; "
                f"the first free one is {max(ranks.values()) + 1}"
            )
        taken[number] = special.encode()
