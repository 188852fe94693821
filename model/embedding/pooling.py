"""From the states of a text's tokens to one vector, and what tells a text's partner from the texts of others.

Shapes: n pairs of this rank, m of all ranks, h hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # keys whose scores are there at a time


def both_texts(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the partners of a micro-batch's texts behind them; without partners, a text is its own.

    It then passes through the model twice, under another dropout (Gao et al. 2021, "SimCSE", section 3).
    """
    return {
        name: torch.cat((batch[name], batch.get(f"other_{name}", batch[name]))) for name in ("tokens", "length")
    }


def pooled(x_sbh: Tensor, length_b1: Tensor, how: str) -> Tensor:
    """Make a unit vector of each text, fp32 [b, h]; `how` is a value of `model.pooling`."""
    x_bsh, length_b1 = x_sbh.transpose(0, 1).float(), length_b1.clamp(min=1)
    if how == "cls":
        found = x_bsh[:, 0]
    elif how == "last":
        found = x_bsh[torch.arange(len(x_bsh), device=x_bsh.device), length_b1[:, 0] - 1]
    else:
        inside = torch.arange(x_bsh.shape[1], device=x_bsh.device) < length_b1
        found = (x_bsh * inside[..., None]).sum(1) / length_b1
    return F.normalize(found, dim=-1)


class Contrast(NamedTuple):
    """What came of a rank's pairs: each one's loss in nats [n], and how many others are as near as its partner [n].

    The gradients [n, h] are those of the summed loss of all ranks.
    """

    losses: Tensor
    ahead: Tensor
    first_gradient: Tensor
    second_gradient: Tensor


@torch.no_grad()
def contrast(
    first: Tensor,
    second: Tensor,
    real: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
) -> Contrast:
    """Tell each text's partner from all second texts of all ranks (van den Oord et al. 2018; Gao et al. 2021, eq. 1).

    Scores are there for n x `chunk` pairs at a time, once for the log-partition and once more for the gradients; what
    grows with the global batch are vectors alone, [m, h].

    Args:
        first: unit vectors of this rank's texts, fp32 [n, h], as many on every rank.
        second: those of their partners.
        real: 1 where a pair counts, else 0, fp32 [n].
        temperature: what cosines are divided by.
        group: the data-parallel ranks.
        chunk: second texts whose scores are there at a time.
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    keys, counts = _gathered(second, group, size), _gathered(real, group, size)
    offset = (dist.get_rank(group) if size > 1 else 0) * len(first)
    own = offset + torch.arange(len(first), device=first.device)
    queries = first / temperature
    target = (queries * second).sum(-1)

    def others(start: int) -> Tensor:
        """Give the scores of some second texts, and minus infinity for each text's partner and for what counts not."""
        scores = queries @ keys[start : start + chunk].T
        places = torch.arange(start, start + scores.shape[1], device=own.device)
        away = (places == own[:, None]) | (counts[start : start + chunk] == 0)
        return scores.masked_fill_(away, float("-inf"))

    rest, ahead = torch.full_like(target, float("-inf")), torch.zeros_like(target)
    for start in range(0, len(keys), chunk):
        scores = others(start)
        rest = torch.logaddexp(rest, scores.logsumexp(-1))
        ahead += (~(scores < target[:, None])).sum(-1)  # what is no number is ahead, not behind
    # From the difference alone: a small loss would be lost between two large numbers.
    losses = F.softplus(rest - target)
    away = torch.expm1(-losses) * real  # the partner's share of the softmax, less 1
    first_gradient, key_gradients = second * away[:, None], torch.zeros_like(keys)
    for start in range(0, len(keys), chunk):
        share = (others(start) - (target + losses)[:, None]).exp() * real[:, None]
        first_gradient += share @ keys[start : start + chunk]
        key_gradients[start : start + chunk] = share.T @ first
    key_gradients[own] += first * away[:, None]
    if size > 1:
        dist.all_reduce(key_gradients, group=group)
    return Contrast(
        losses=losses * real,
        ahead=ahead,
        first_gradient=first_gradient / temperature,
        second_gradient=key_gradients[own] / temperature,
    )


def _gathered(own: Tensor, group: dist.ProcessGroup | None, size: int) -> Tensor:
    if size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts)
