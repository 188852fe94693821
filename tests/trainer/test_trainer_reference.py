"""Drawing tokens: the temperature's ends, and the same draws for the same seed."""

from __future__ import annotations

import pytest
import torch

from basestone.trainer.reference import generate

VOCAB, LIKELIEST = 50, 7


def logits(ids: torch.Tensor) -> torch.Tensor:
    """Logits that do not depend on the text: one token leads by little."""
    row = torch.linspace(-30, 20, VOCAB)[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))]
    row[LIKELIEST] = 20.5
    return row.expand(1, ids.shape[1], VOCAB)


def drawn(temperature: float, *, top_k: int = 0, seed: int = 0) -> list[int]:
    ids = generate(
        logits,
        torch.tensor([[0]]),
        max_new_tokens=200,
        temperature=temperature,
        top_k=top_k,
        eos=-1,
        max_sequence_length=16,
        seed=seed,
    )
    return ids[0, 1:].tolist()


@pytest.mark.parametrize("top_k", [0, 1, 50])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-42, 1e-30, 1e-3])
def test_towards_zero_the_likeliest_is_drawn(temperature, top_k):
    assert drawn(temperature, top_k=top_k) == [LIKELIEST] * 200


def test_towards_infinity_all_are_alike_and_one_seed_draws_the_same():
    assert len(set(drawn(1e6))) > 40 and drawn(1e6) == drawn(1e6) != drawn(1e6, seed=(1 << 63) - 1)
    assert len(set(drawn(1e6, top_k=3))) == 3


def test_at_one_shares_are_the_softmaxs():
    leading = logits(torch.tensor([[0]]))[0, -1].softmax(-1)[LIKELIEST]
    share = sum(drawn(1.0, seed=seed).count(LIKELIEST) for seed in range(20)) / 4000
    assert share == pytest.approx(float(leading), abs=0.03)
