"""What a fine-tuning says at its end: figures, a table and the model card. Imports no torch."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from ..hub.config_file import name_of
from .directory import licence_lines
from .scores import score_rows
from .settings import FinetuneSettings

SCORE_TITLES = ["class", "precision", "recall", "F1", "examples"]
PACKAGES = ("transformers", "peft", "accelerate", "torch")


def summary(settings: FinetuneSettings, figures: dict[str, Any]) -> list[str]:
    """Give the lines for a person: the scores where there are some, and the final line."""
    losses, heldout = figures["losses"], figures["heldout"]
    lines = []
    text = (
        f"{settings.out}: {name_of(settings.source)} on {figures['examples']} examples of {settings.data.name}, "
        f"{len(losses)} steps, loss {losses[0][1]:.4f} -> {losses[-1][1]:.4f}"
    )
    if heldout and "accuracy" in heldout:
        rows = [SCORE_TITLES, *score_rows(heldout)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(SCORE_TITLES))]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
        text += (
            f"; held out: accuracy {heldout['accuracy']:.4f}, macro F1 {heldout['macro']['f1']:.4f} "
            f"over {heldout['examples']} examples"
        )
    elif heldout:
        before = figures["heldout_before"]["loss"]
        text += f"; held out: {before:.4f} -> {heldout['loss']:.4f} over {heldout['tokens']} tokens"
    if figures["cut"]:
        what = "answers" if settings.task == "sft" else "texts"
        text += f"; {figures['cut']} {what} were cut at {figures['max_length']} tokens"
    return [*lines, text]


def tuned_card(settings: FinetuneSettings, figures: dict[str, Any]) -> str:
    """Write README.md: what was tuned, on what, how, and what came of it."""
    classifies = settings.task == "classify"
    front = [
        f"library_name: {'peft' if settings.keep_adapter else 'transformers'}",
        f"pipeline_tag: {'text-classification' if classifies else 'text-generation'}",
        f"base_model: {json.dumps(name_of(settings.source), ensure_ascii=False)}",
        f"base_model_relation: {'adapter' if settings.keep_adapter else 'finetune'}",
        *licence_lines(settings.source),
        "tags:",
        "- basestone",
    ]
    kind = "sequence classification" if classifies else "supervised fine-tuning, with loss on the answers alone"
    way = "all weights" if settings.lora is None else f"LoRA adapters of rank {settings.lora}"
    if settings.lora is not None and not settings.keep_adapter:
        way += ", merged into the weights"
    facts = [
        ["tuned from", _cell(name_of(settings.source))],
        ["task", kind],
        ["what was tuned", way],
        ["data", f"{_cell(settings.data.name)}, {figures['examples']} examples"],
        ["data, sha256", figures["data_sha256"]],
        ["steps x batch", f"{len(figures['losses'])} x {settings.batch}"],
        ["learning rate", f"{settings.learning_rate:g}, linear, warmup {settings.warmup:g} of the steps"],
        ["weight decay, clipping", f"{settings.weight_decay:g}, {settings.clip:g}"],
        ["longest sequence", f"{figures['max_length']} tokens; {figures['cut']} examples were cut"],
        ["seed", str(settings.seed)],
        ["training loss", f"{figures['losses'][0][1]:.4f} -> {figures['losses'][-1][1]:.4f} (nats)"],
    ]
    if classifies:
        facts.insert(2, ["classes, in order", _cell(", ".join(figures["heldout"]["classes"]))])
    sections = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {_cell(settings.out.name)}",
        f"{_cell(name_of(settings.source))}, fine-tuned with Basestone.",
        _table(["", ""], facts),
        "## Held-out results\n\n" + _results(figures),
        "## Versions\n\n" + _table(["package", "version"], [[name, version(name)] for name in PACKAGES]),
    ]
    return "\n\n".join(sections) + "\n"


def _results(figures: dict[str, Any]) -> str:
    heldout = figures["heldout"]
    if not heldout:
        return "None were measured."
    if "accuracy" not in heldout:
        rows = [
            [name, f"{found['loss']:.4f}", str(found["tokens"])]
            for name, found in (("before", figures["heldout_before"]), ("after", heldout))
        ]
        return _table(["", "loss (nats per answer token)", "tokens"], rows)
    rows = [[_cell(row[0]), *row[1:]] for row in score_rows(heldout)]
    return f"Accuracy {heldout['accuracy']:.4f}.\n\n" + _table(SCORE_TITLES, rows)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
