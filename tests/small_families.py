"""Run files of small models of every family, on one corpus."""

from __future__ import annotations

from pathlib import Path

RUN = """
[run]
processes = 2
[model]
{model}
num_layers = 2
hidden_size = 64
num_attention_heads = 4
max_sequence_length = 64
{task}
[data]
train = "{shards}/train"
tokenizer = "{tokenizer}"
sequence_length = 48
[data.heldout]
topics = "{shards}/heldout"
[train]
steps = 6
global_batch = 8
micro_batch = 2
dtype = "fp32"
[optimizer]
lr = 1e-3
[schedule]
kind = "constant"
[evaluate]
every_steps = 3
max_tokens = 2000
[checkpoint]
every_steps = 3
"""
# by name: what stands under [model], and the section of the task
KINDS = {
    "llama": ('family = "llama"', ""),
    "bert": ('family = "bert"\ndropout = 0.0', ""),
    "t5": ('family = "t5"\nnum_decoder_layers = 2', ""),
    "bert-sentences": (
        'family = "bert"\ndropout = 0.0\nnext_sentence = false\npooling = "mean"\ntemperature = 1.0',
        '[task]\npairs = "neighbours"',
    ),
    "llama-sentences": (
        'family = "llama"\npooling = "last"\ntemperature = 1.0',
        '[task]\npairs = "neighbours"',
    ),
}


def write_run(folder: Path, kind: str, corpus: Path, tokenizer: Path) -> Path:
    """Write run.toml of a kind into a folder."""
    model, task = KINDS[kind]
    path = folder / "run.toml"
    path.write_text(RUN.format(model=model, task=task, shards=corpus / "shards", tokenizer=tokenizer))
    return path
