"""Pairs of texts, with scores or without: a file of JSON lines, checked whole before a model is loaded. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..finetuning.examples import LineError, only_keys, read_examples, text_of

FORM = '{"text", "other"} with or without "score"'


@dataclass(frozen=True)
class TextPair:
    """Two texts, and how alike people find them where somebody said so."""

    line: int
    text: str
    other: str
    score: float | None


def read_pairs(path: Path) -> tuple[list[TextPair], list[str]]:
    """Read a file of pairs; give them, and what is wrong.

    Either every line has a score or none has, and what is asked of them must have an answer.
    """
    pairs, wrong = read_examples(path, _parse)
    return pairs, wrong or _problems(path, pairs)


def _parse(line: int, value: dict[str, Any]) -> TextPair:
    texts = {key: text_of(value, key, FORM) for key in ("text", "other")}
    for key, text in texts.items():
        if not text.strip():
            raise LineError(f'has an empty "{key}"')
    score = _number(value["score"]) if "score" in value else None
    only_keys(value, ("text", "other", "score"), "similarity", FORM)
    return TextPair(line, **texts, score=score)


def _number(score: Any) -> float:
    try:
        number = math.nan if isinstance(score, bool | str | None) else float(score)
    except (OverflowError, TypeError):
        number = math.nan
    if not math.isfinite(number):
        raise LineError(f"has the score {json.dumps(score)[:40]}; give a number")
    return number


def _problems(path: Path, pairs: list[TextPair]) -> list[str]:
    scores = [pair.score for pair in pairs]
    if None in scores:
        scored = next((pair.line for pair in pairs if pair.score is not None), None)
        if scored is not None:
            bare = pairs[scores.index(None)].line
            return [f"{path}: line {scored} has a score and line {bare} has none; give all lines one, or none"]
        if len({pair.other for pair in pairs}) < 2:
            return [f'{path}: every "other" is the same; a partner is looked for among two or more']
    elif len(set(scores)) < 2:
        return [f"{path}: every score is {scores[0]:g}; a correlation needs two or more different ones"]
    return []
