"""What sentence-transformers reads of a directory beside what transformers does: modules.json, a folder for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import ModelConfig
from ..families import layout_of
from ..hf.rules import Row

POOLING_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
POOLING_FILE = "1_Pooling/config.json"


def trunk_rows(rows: list[Row], config: ModelConfig) -> list[Row]:
    """Keep the rows of a model without a head, by the names that the class of the trunk alone has."""
    held = layout_of(config)
    return [
        replace(row, hf_names=tuple(name.partition(".")[2] for name in row.hf_names))
        for row in rows
        if row.source in held
    ]


def sentence_files(
    config: ModelConfig, sequence_length: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Give what is written beside the weights, by its place in the directory.

    `options` are what transformers' class takes beside its config. sentence-transformers hands them on as it loads.
    """
    assert config.pooling is not None
    settings: dict[str, Any] = {"max_seq_length": sequence_length, "do_lower_case": False}
    parts = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
    return {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, (path, name) in enumerate(parts)
        ],
        "sentence_bert_config.json": settings | ({"model_args": dict(options)} if options else {}),
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        POOLING_FILE: {
            "word_embedding_dimension": config.hidden_size,
            **{f"pooling_mode_{mode}": config.pooling == how for how, mode in POOLING_MODES.items()},
        },
    }


def pooling_of(settings: Mapping[str, Any]) -> str | None:
    """Read the file of the pooling back; None for one that ours is not."""
    given = [name.removeprefix("pooling_mode_") for name, value in settings.items() if value is True]
    named = {mode: how for how, mode in POOLING_MODES.items()}
    return named.get(given[0]) if len(given) == 1 else None
