"""Cross entropy over a vocabulary that is cut over tensor-parallel ranks.

Works through the logits in chunks: the fp32 copy that a softmax wants is never larger than one chunk, and the
backward pass recomputes the softmax from the stored log-partition instead of keeping it. Padded vocabulary rows
take no part in the softmax, so the loss is that of the true vocabulary in every layout.

Shapes: t positions (sequence x batch), v vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# fp32 scratch: what stays in a core's cache; what fills a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


class Outcome(NamedTuple):
    """What a model made of a part of its loss: the loss of every prediction in nats, fp32, and which were right.

    `right` is like `losses`, 0 or 1, or None where the model does not tell: in training.
    """

    losses: Tensor
    right: Tensor | None = None


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_tv, targets_t, first_row, vocab_size, z_loss, group):  # type: ignore[no-untyped-def]
        rows = max(1, CHUNK_ELEMENTS[logits_tv.device.type] // logits_tv.shape[1])
        valid = min(max(vocab_size - first_row, 0), logits_tv.shape[1])  # columns that are not padding
        parallel = dist.is_initialized() and dist.get_world_size(group) > 1
        if valid:
            maxima_t = logits_tv[:, :valid].amax(dim=-1).float()
        else:
            maxima_t = logits_tv.new_full((logits_tv.shape[0],), float("-inf"), dtype=torch.float32)
        if parallel:
            dist.all_reduce(maxima_t, op=dist.ReduceOp.MAX, group=group)
        local_t = targets_t - first_row
        mine_t = (local_t >= 0) & (local_t < logits_tv.shape[1])
        index_t = torch.where(mine_t, local_t, 0).unsqueeze(-1)
        picked_t = torch.where(mine_t, logits_tv.gather(1, index_t).squeeze(-1).float(), 0.0)
        sums_t = torch.empty_like(maxima_t)
        for start in range(0, logits_tv.shape[0], rows):
            chunk = slice(start, start + rows)
            scratch = logits_tv[chunk, :valid].to(torch.float32, copy=True)  # never the logits themselves
            sums_t[chunk] = scratch.sub_(maxima_t[chunk, None]).exp_().sum(dim=-1)
        both = torch.stack((sums_t, picked_t))
        if parallel:
            dist.all_reduce(both, group=group)
        log_partition_t = maxima_t + both[0].log()
        ctx.save_for_backward(logits_tv, log_partition_t, index_t, mine_t)
        ctx.rows, ctx.valid, ctx.z_loss = rows, valid, z_loss
        return log_partition_t - both[1] + z_loss * log_partition_t.square()

    @staticmethod
    def backward(ctx, grad_t):  # type: ignore[no-untyped-def]
        logits_tv, log_partition_t, index_t, mine_t = ctx.saved_tensors
        grad_tv = torch.empty_like(logits_tv)
        grad_tv[:, ctx.valid :] = 0
        scale_t = grad_t * (1 + 2 * ctx.z_loss * log_partition_t)
        for start in range(0, logits_tv.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            softmax = logits_tv[chunk, : ctx.valid].to(torch.float32, copy=True)
            softmax.sub_(log_partition_t[chunk, None]).exp_().mul_(scale_t[chunk, None])
            index, mine = index_t[chunk], mine_t[chunk]
            if ctx.valid:
                correction = torch.where(mine, -grad_t[chunk], 0.0).unsqueeze(-1)
                softmax.scatter_add_(1, index.clamp(max=ctx.valid - 1), correction)
            grad_tv[chunk, : ctx.valid].copy_(softmax)
        return grad_tv, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    first_row: int,
    vocab_size: int,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Give the loss of every position in nats, fp32, shaped like `targets`.

    Args:
        logits: [..., v] of this rank, whose first column is vocabulary row `first_row`.
        targets: true ids, int64, the shape of `logits` without its last axis.
        first_row: global id of this rank's first column.
        vocab_size: true vocabulary; columns from there on are padding.
        z_loss: weight of the squared log-partition (Chowdhery et al. 2022, section 5).
        group: the tensor-parallel group.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    losses = _VocabParallelCrossEntropy.apply(flat, targets.reshape(-1), first_row, vocab_size, z_loss, group)
    return losses.view(targets.shape)


@torch.no_grad()
def vocab_parallel_right(
    logits: Tensor, targets: Tensor, *, first_row: int, vocab_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Tell where the target is the likeliest, fp32 0 or 1, shaped like `targets`; see vocab_parallel_cross_entropy."""
    valid = min(max(vocab_size - first_row, 0), logits.shape[-1])
    local = targets - first_row
    mine = (local >= 0) & (local < logits.shape[-1])
    picked = logits.gather(-1, torch.where(mine, local, 0).unsqueeze(-1)).squeeze(-1).float()
    both = torch.stack(
        (
            logits[..., :valid].amax(-1).float() if valid else torch.full_like(picked, float("-inf")),
            torch.where(mine, picked, float("-inf")),
        )
    )
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return (both[1] >= both[0]).float()
