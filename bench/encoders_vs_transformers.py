"""A forward and backward of BERT here and in transformers: the same shape, the same work, eager both, in turns.

python bench/encoders_vs_transformers.py [--rounds 10]

One process, fp32, rows without padding, no dropout, 15 % of the tokens predicted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from basestone.model.config import ModelConfig
from basestone.model.layers import megatron_config
from basestone.model.pipeline import chunks_of_ranks
from basestone.model.stage import Stage, prepare_parameters
from basestone.trainer import runtime as processes

LAYERS, HIDDEN, HEADS, SEQUENCE, ROWS, VOCAB = 4, 256, 4, 128, 16, 8192
PREDICTED = 0.15
KINDS = {"masked tokens and next sentences": True, "masked tokens": False}


def batch_of() -> dict[str, torch.Tensor]:
    """Give rows at random."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (ROWS, SEQUENCE), generator=generator)
    return {
        "tokens": tokens,
        "segments": (torch.arange(SEQUENCE) > SEQUENCE // 2).long().expand(ROWS, -1).contiguous(),
        "labels": tokens,
        "weights": (torch.rand(ROWS, SEQUENCE, generator=generator) < PREDICTED).float(),
        "next_label": torch.randint(2, (ROWS, 1), generator=generator),
    }


def ours(batch: dict[str, torch.Tensor], next_sentence: bool) -> Callable[[], None]:
    """Give a step of our model."""
    model = ModelConfig(
        family="bert",
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        max_sequence_length=SEQUENCE,
        vocab_size=VOCAB,
        dropout=0.0,
        next_sentence=next_sentence,
    )
    config = megatron_config(model, dtype=torch.float32, sequence_parallel=False, on_cpu=True)
    stage = Stage(model, config, chunks_of_ranks(LAYERS, 1)[0])
    prepare_parameters(stage, model, seed=0)

    def step() -> None:
        outcomes = stage(batch)
        losses = outcomes["masked"].losses.sum() / batch["weights"].sum()
        if next_sentence:
            losses = losses + outcomes["next_sentence"].losses.mean()
        losses.backward()
        stage.zero_grad()

    return step


def theirs(batch: dict[str, torch.Tensor], next_sentence: bool) -> Callable[[], None]:
    """Give a step of transformers' class."""
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=SEQUENCE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    made = transformers.BertForPreTraining if next_sentence else transformers.BertForMaskedLM
    model = made(config).train()
    labels = batch["labels"].masked_fill(batch["weights"] == 0, -100)
    inputs = {"input_ids": batch["tokens"], "token_type_ids": batch["segments"], "labels": labels}
    if next_sentence:
        inputs["next_sentence_label"] = batch["next_label"][:, 0]

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    processes.start()
    print("| what | here, ms | transformers, ms | theirs over ours |\n|---|---|---|---|")
    for name, next_sentence in KINDS.items():
        batch = batch_of()
        if not next_sentence:
            del batch["next_label"]
        steps = {side.__name__: side(batch, next_sentence) for side in (ours, theirs)}
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for number in range(rounds + 1):
            for side, step in steps.items():
                started = time.perf_counter()
                step()
                if number:  # the first one warms up
                    seconds[side].append(time.perf_counter() - started)
        medians = {side: 1e3 * statistics.median(found) for side, found in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        print(f"| {name} | {medians['ours']:.0f} | {medians['theirs']:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
