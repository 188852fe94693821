"""How one global parameter and its Hugging Face tensors turn into one another, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


class AdapterError(ValueError):
    """Report a model that the other side cannot hold, by the name of the field."""

    exit_code = 64


class Rule:
    """Turn a global tensor into Hugging Face tensors and back; as it stands, one into one, unchanged."""

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn the global tensor into its Hugging Face tensors, which may be views of it."""
        return (tensor,)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Turn the Hugging Face tensors into the global tensor: the inverse of `split`."""
        return parts[0]


class Transposed(Rule):
    """GPT-2's Conv1D, [in, out], against a linear layer's [out, in]."""

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give [in, out]."""
        return (tensor.t(),)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Give [out, in]."""
        return parts[0].t()


@dataclass(frozen=True)
class Halves(Rule):
    """[gate; up] on the rows against a gate and an up tensor."""

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give (gate, up)."""
        return tensor.chunk(2)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack gate and up."""
        return torch.cat(tuple(parts))


@dataclass(frozen=True)
class Vocabulary(Rule):
    """Rows padded from `num_rows` to `num_padded_rows` against the true vocabulary."""

    num_rows: int
    num_padded_rows: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut the padding rows off."""
        return (tensor[: self.num_rows],)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add padding rows of zeros."""
        padding = parts[0].new_zeros(self.num_padded_rows - self.num_rows, *parts[0].shape[1:])
        return torch.cat((parts[0], padding))


@dataclass(frozen=True)
class QueryGroups(Rule):
    """Rows of [the group's query heads | its key head | its value head], group after group, against q, k, v.

    Works on weights [rows, hidden] and biases [rows] alike.
    """

    num_heads: int
    num_groups: int
    head_dim: int

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give (q, k, v), each with its heads in order along the rows."""
        tail = tensor.shape[1:]
        per_group = self.num_heads // self.num_groups
        groups = tensor.reshape(self.num_groups, per_group + 2, self.head_dim, *tail)
        return (
            groups[:, :per_group].reshape(-1, *tail),
            groups[:, per_group].reshape(-1, *tail),
            groups[:, per_group + 1].reshape(-1, *tail),
        )

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Interleave q, k and v group by group."""
        tail = parts[0].shape[1:]
        groups = [part.reshape(self.num_groups, -1, self.head_dim, *tail) for part in parts]
        return torch.cat(groups, dim=1).reshape(-1, *tail)


@dataclass(frozen=True)
class StackedHeads(Rule):
    """The same rows against GPT-2's one tensor [q | k | v], in Conv1D's order for a weight."""

    groups: QueryGroups

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give [hidden, 3 hidden] for a weight, [3 hidden] for a bias."""
        stacked = torch.cat(self.groups.split(tensor))
        return (stacked.t() if stacked.dim() == 2 else stacked,)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Interleave the three blocks group by group."""
        stacked = parts[0].t() if parts[0].dim() == 2 else parts[0]
        return self.groups.join(stacked.chunk(3))


@dataclass(frozen=True)
class Row:
    """One line of a family's table: a global parameter, its Hugging Face names, and the rule between them."""

    source: str
    hf_names: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face directory: part `index` of what `rule` makes of the parameter `source`."""

    name: str
    shape: tuple[int, ...]
    source: str
    rule: Rule
    index: int


def differences(found: Mapping[str, object], needed: Mapping[str, object]) -> list[str]:
    """Name every field of `found` that is not as needed; a needed tuple holds the values that will do."""
    wrong = []
    for name, value in needed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if found[name] not in allowed:
            wrong.append(f"{name} = {found[name]!r} (needs {' or '.join(map(repr, allowed))})")
    return wrong


def refuse_unless(subject: str, found: Mapping[str, object], needed: Mapping[str, object]) -> None:
    """Raise AdapterError, opened by `subject`, that names every field of `found` that is not as needed."""
    if wrong := differences(found, needed):
        raise AdapterError(f"{subject}: {'; '.join(wrong)}")
