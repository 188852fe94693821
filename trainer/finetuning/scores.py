"""Accuracy, precision, recall and F1 of a classification. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def classification_scores(
    expected: Sequence[int], predicted: Sequence[int], labels: Sequence[str]
) -> dict[str, Any]:
    """Count, and divide: a class that nobody predicted has precision 0, one that has no examples recall 0.

    Returns:
        `accuracy`; `macro`, the plain mean over classes of `precision`, `recall` and `f1`; and the same by class
        under `classes`, with `support`, the number of its examples.
    """
    pairs = list(zip(expected, predicted, strict=True))
    right = Counter(truth for truth, guess in pairs if truth == guess)
    support = Counter(truth for truth, _ in pairs)
    guesses = Counter(guess for _, guess in pairs)
    classes = {}
    for index, label in enumerate(labels):
        hits, wrong = right[index], support[index] + guesses[index] - 2 * right[index]
        classes[label] = {
            "precision": hits / guesses[index] if guesses[index] else 0.0,
            "recall": hits / support[index] if support[index] else 0.0,
            "f1": 2 * hits / (2 * hits + wrong) if hits else 0.0,
            "support": support[index],
        }
    macro = {
        name: sum(row[name] for row in classes.values()) / len(classes)
        for name in ("precision", "recall", "f1")
    }
    return {
        "accuracy": sum(right.values()) / len(pairs),
        "macro": macro,
        "classes": classes,
        "examples": len(pairs),
    }


def score_rows(scores: dict[str, Any]) -> list[list[str]]:
    """Lay the scores out: a row for each class, then the means; columns class, precision, recall, F1, examples."""
    rows = [
        [label, *(f"{row[name]:.4f}" for name in ("precision", "recall", "f1")), str(row["support"])]
        for label, row in scores["classes"].items()
    ]
    macro = [f"{scores['macro'][name]:.4f}" for name in ("precision", "recall", "f1")]
    return [*rows, ["macro", *macro, str(scores["examples"])]]
