"""A forward and backward of BERT and T5 here and in transformers: same shape, same work, eager both, in turns.

python bench/encoders_vs_transformers.py [--rounds 10]

One process, fp32, rows without padding, no dropout. BERT predicts 15 % of its tokens; T5's targets have 114 tokens for
512 of the inputs, as span corruption makes them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from torch import Tensor

from basestone.model.config import ModelConfig
from basestone.model.layers import megatron_config
from basestone.model.pipeline import chunks_of_ranks
from basestone.model.stage import Stage, prepare_parameters
from basestone.trainer import runtime as processes

LAYERS, HIDDEN, HEADS, SEQUENCE, ROWS, VOCAB = 4, 256, 4, 128, 16, 8192
PREDICTED = 0.15
INPUTS, TARGETS, PAIRS = 512, 114, 4
IGNORED = -100  # transformers' label of what is not predicted

Batch = Mapping[str, Tensor]
Step = Callable[[], None]


def random_tokens(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw ids of the vocabulary."""
    return torch.randint(VOCAB, shape, generator=generator)


def our_step(model: ModelConfig, batch: Batch, weights: Mapping[str, Tensor]) -> Step:
    """Give a step of our model; `weights` say by part which predictions count."""
    config = megatron_config(model, dtype=torch.float32, sequence_parallel=False, on_cpu=True)
    stage = Stage(model, config, chunks_of_ranks(model.total_layers, 1)[0])
    prepare_parameters(stage, model, seed=0)

    def step() -> None:
        outcomes = stage(batch)
        means = [outcomes[part].losses.sum() / weights[part].sum() for part in weights]
        torch.stack(means).sum().backward()
        stage.zero_grad()

    return step


def their_step(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Step:
    """Give a step of a class of transformers."""
    model.train()

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad()

    return step


def bert(next_sentence: bool) -> tuple[Step, Step]:
    """Give both steps of BERT."""
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(generator, ROWS, SEQUENCE)
    segments = (torch.arange(SEQUENCE) > SEQUENCE // 2).long().expand(ROWS, -1).contiguous()
    weights = (torch.rand(ROWS, SEQUENCE, generator=generator) < PREDICTED).float()
    follows = torch.randint(2, (ROWS, 1), generator=generator)
    shape = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    model = ModelConfig(
        family="bert", max_sequence_length=SEQUENCE, dropout=0.0, next_sentence=next_sentence, **shape
    )
    batch = {"tokens": tokens, "segments": segments, "labels": tokens, "weights": weights}
    inputs = {
        "input_ids": tokens,
        "token_type_ids": segments,
        "labels": tokens.masked_fill(weights == 0, IGNORED),
    }
    counted = {"masked": weights}
    if next_sentence:
        batch["next_label"], inputs["next_sentence_label"] = follows, follows[:, 0]
        counted["next_sentence"] = torch.ones(ROWS)
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
    return our_step(model, batch, counted), their_step(made(config), inputs)


def t5() -> tuple[Step, Step]:
    """Give both steps of T5."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = random_tokens(generator, PAIRS, INPUTS), random_tokens(generator, PAIRS, TARGETS)
    decoder_tokens = torch.cat((torch.zeros_like(labels[:, :1]), labels[:, :-1]), dim=1)
    model = ModelConfig(
        family="t5",
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=2 * HIDDEN,
        max_sequence_length=INPUTS,
        vocab_size=VOCAB,
        dropout=0.0,
    )
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=2 * HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    batch = {"tokens": tokens, "decoder_tokens": decoder_tokens, "labels": labels}
    inputs = {"input_ids": tokens, "decoder_input_ids": decoder_tokens, "labels": labels}
    made = transformers.T5ForConditionalGeneration(config)
    return our_step(model, batch, {"spans": torch.ones_like(labels)}), their_step(made, inputs)


def measure(steps: Iterable[Step], rounds: int) -> tuple[float, float, float]:
    """Give the medians of both in ms, and that of theirs over ours, step by step in turns."""
    seconds: list[tuple[float, ...]] = []
    both = tuple(steps)
    for number in range(rounds + 1):
        found = []
        for step in both:
            started = time.perf_counter()
            step()
            found.append(time.perf_counter() - started)
        if number:  # the first one warms up
            seconds.append(tuple(found))
    ours, theirs = zip(*seconds, strict=True)
    ratio = statistics.median(b / a for a, b in seconds)
    return 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs), ratio


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    processes.start()
    kinds = {
        "BERT, masked tokens and next sentences": lambda: bert(True),
        "BERT, masked tokens": lambda: bert(False),
        "T5, spans": t5,
    }
    print("| what | here, ms | transformers, ms | theirs over ours |\n|---|---|---|---|")
    for name, make in kinds.items():
        ours, theirs, ratio = measure(make(), rounds)
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
