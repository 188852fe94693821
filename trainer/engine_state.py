"""One view of DeepSpeed's optimizer classes: the fragments of fp32 masters and optimizer states that a rank owns.

The differences between the classes, and the private names of theirs that we rest on, end here. The checkpoint and
the weight initialisation know nothing else of DeepSpeed.

    class                      chosen for                       masters
    DeepSpeedZeroOptimizer     ZeRO-1 fp32, ZeRO-2              flat partitions of each group
    BF16_Optimizer             ZeRO-1 bf16, fp32 accumulation   flat partitions of each group
    DeepSpeedZeroOptimizer_Stage3  ZeRO-3                       flat partitions of each sub-group
    torch.optim.AdamW          ZeRO-0 fp32                      the parameters themselves

With the optimizer offloaded to NVMe, stage 3 keeps masters and states of a large enough sub-group in files, and their
tensors are empty. Here such a sub-group is read while its fragments are looked at, and written back after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

STATE_KEYS = ("exp_avg", "exp_avg_sq")  # AdamW's
MASTER = "master"
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Fragment(NamedTuple):
    """A flat range of a parameter's tensor-parallel piece, owned by this rank.

    `tensors` maps "master" and each optimizer state to a 1-D fp32 view of `numel` elements; writing to a view
    writes to the optimizer. `owned` is true on one of the ranks that hold the same piece.
    """

    name: str
    start: int
    numel: int
    owned: bool
    tensors: dict[str, Tensor]


class EngineState:
    """Iterate over, and write through to, what DeepSpeed's optimizer holds on this rank."""

    def __init__(self, module: nn.Module, optimizer: Any, dp_group: dist.ProcessGroup) -> None:
        self._parameters = dict(module.named_parameters())
        self._optimizer = optimizer
        self._dp_group = dp_group
        self._inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._create_states()

    @property
    def is_replicated(self) -> bool:
        """Tell whether every data-parallel rank holds the same fragments (ZeRO-0)."""
        return self._optimizer is self._inner

    def fragments(self) -> Iterator[Fragment]:
        """Give every fragment that this rank owns: sub-groups that lie in files one by one, else in order of names.

        A fragment's tensors are valid until the next one is asked for: after that, those of a sub-group in files are
        written back and emptied.
        """
        names_of: dict[int | None, list[str]] = {}
        for name in sorted(self._parameters):
            names_of.setdefault(self._swapped_group(self._parameters[name]), []).append(name)
        for group, names in names_of.items():
            with self._in_memory(group):
                for name in names:
                    fragment = self._fragment(name)
                    if fragment is not None:
                        yield fragment

    def _fragment(self, name: str) -> Fragment | None:
        parameter: Any = self._parameters[name]
        place = self._place(parameter)
        if place is None or not place[3]:
            return None
        flat, offset, start, numel = place
        tensors = {MASTER: flat.detach().view(-1).narrow(0, offset, numel)}
        for key in STATE_KEYS:
            tensors[key] = self._inner.state[flat][key].view(-1).narrow(0, offset, numel)
        return Fragment(name, start, numel, parameter.owned, tensors)

    def _swapped_group(self, parameter: nn.Parameter) -> int | None:
        """Give the sub-group of a parameter whose master and states lie in files; None where they do not."""
        optimizer = self._optimizer
        if not getattr(optimizer, "swap_optimizer", False):
            return None
        group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        return group if self._is_swapped(group) else None

    def _is_swapped(self, group: int) -> bool:
        optimizer = self._optimizer
        return getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(group)

    @contextlib.contextmanager
    def _in_memory(self, group: int | None) -> Iterator[None]:
        """Read a sub-group that lies in files, and write it back; nothing to do for None."""
        if group is None:
            yield
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            # Leaves gradients that wait for the step alone; DeepSpeed's swap-out would forget them.
            self._optimizer._writeback_swap_state(group, write_opt_state=True, write_gradients=False)

    @property
    def steps(self) -> int:
        """Updates that the optimizer has made: AdamW's bias correction counts them."""
        return max((int(state["step"]) for state in self._inner.state.values()), default=0)

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self._inner.state.values():
            state["step"].fill_(float(value))

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The loss scale of fp16, and the counts by which it moves; None where it does not move."""
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if not getattr(scaler, "dynamic", False):
            return None
        return {name: getattr(scaler, name) for name in LOSS_SCALER_FIELDS}

    @loss_scale.setter
    def loss_scale(self, values: dict[str, float] | None) -> None:
        if self.loss_scale is not None:
            for name, value in (values or {}).items():
                setattr(self._optimizer.loss_scaler, name, value)

    def refresh(self) -> None:
        """Renew the working parameters after the masters were written to."""
        optimizer = self._optimizer
        if self.is_replicated:
            return
        if self._is_stage3:
            self._refresh_stage3()
        else:
            optimizer.update_lp_params()

    def _refresh_stage3(self) -> None:
        optimizer = self._optimizer
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            with self._in_memory(index if self._is_swapped(index) else None):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if persistent := optimizer.persistent_parameters:  # small parameters that stay gathered
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @property
    def _is_stage3(self) -> bool:
        return hasattr(self._optimizer, "fp16_partitioned_groups_flat")

    def _place(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """Give (flat master, offset in it, start in the parameter's piece, elements), None where it is not ours."""
        optimizer = self._optimizer
        if self.is_replicated:
            return parameter, 0, 0, parameter.numel()
        if self._is_stage3:
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            size = parameter.ds_tensor.ds_numel
            start = dist.get_rank(self._dp_group) * size
            return (
                optimizer.fp32_partitioned_groups_flat[group],
                offset,
                start,
                self._unpadded(parameter, start),
            )
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flats = (
            getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        )
        address, source = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flats[mapping.param_group_index], address.start, source.start, source.numel

    @staticmethod
    def _unpadded(parameter: Any, start: int) -> int:
        """Count the elements of this rank's stage-3 partition that are not padding."""
        return max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))

    def _flat_masters(self) -> list[Tensor]:
        optimizer = self._optimizer
        for name in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if flats := getattr(optimizer, name, None):
                return list(flats)
        return [parameter for group in self._inner.param_groups for parameter in group["params"]]

    def _create_states(self) -> None:
        """Make AdamW's states at zero: torch makes them at the first step, after a checkpoint would be loaded."""
        fused = bool(self._inner.defaults.get("fused"))
        for index, flat in enumerate(self._flat_masters()):
            if "step" in self._inner.state[flat]:
                continue
            with self._in_memory(index if self._is_swapped(index) else None):
                device = flat.device if fused else torch.device("cpu")
                self._inner.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    **{key: torch.zeros_like(flat, requires_grad=False) for key in STATE_KEYS},
                }
