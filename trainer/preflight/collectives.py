"""All-reduces over all ranks, before anything is built on them: that they work, at every size, and how fast.

They run on a thread and in a process group of their own: what hangs there keeps nobody from saying so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import message_of
from ..runtime import backend_of
from .judge import Outcome, collective_problems, slow_nodes
from .limits import PreflightSection
from .meeting import Meeting

CPU_BYTES = (4 << 10, 1 << 20, 16 << 20)
GPU_BYTES = (*CPU_BYTES, 256 << 20)
NUM_TIMED = 3
POLL_S = 0.05
FP32_BYTES = 4
CONNECT = "connecting the ranks"


class Collectives:
    """The process group of the checks, from `measure` to `close`."""

    def __init__(
        self,
        store: dist.Store,
        meeting: Meeting,
        device: torch.device,
        rank: int,
        world_size: int,
        host: str,
        limits: PreflightSection,
    ) -> None:
        """Take the store of this start, on which the group has keys of its own."""
        self._store, self._meeting, self._device = dist.PrefixStore("group", store), meeting, device
        self._rank, self._world_size, self._host, self._limits = rank, world_size, host, limits
        self.sizes = CPU_BYTES if device.type == "cpu" else GPU_BYTES
        self._doing, self._since_s = CONNECT, 0.0

    def check(self, firsts: Sequence[tuple[int, str]]) -> float:
        """Reduce every size over all ranks; give the bus bandwidth of the largest in bytes/s.

        Args:
            firsts: rank and host of one rank of each node.

        Raises:
            ConfigError: the same on every rank: sums are wrong, a size hangs, or it is too slow.
        """
        outcome = self._guarded(self._all_sizes)
        limit_s, world_size = self._limits.collective_s, self._world_size

        def judged(said: Mapping[int, str]) -> list[str]:
            outcomes = {rank: Outcome.of_json(text) for rank, text in said.items()}
            return collective_problems(outcomes, world_size, limit_s)

        self._meeting.conclude("collectives", outcome.as_json(), judged)
        wanted = self._limits.min_all_reduce_gb_per_s
        if self._meeting.choose("too slow", outcome.rates[-1] < wanted * 1e9):
            self._find_slow(outcome.rates[-1], firsts)
        return outcome.rates[-1]

    def close(self) -> None:
        """Leave the group, at a good end only."""
        dist.destroy_process_group()

    # ---- all ranks together ---------------------------------------------------------------------------------

    def _all_sizes(self, rates: list[float]) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        dist.init_process_group(
            backend_of(self._device),
            store=self._store,
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=10 * self._limits.collective_s),  # the limit is kept outside
            device_id=None if self._device.type == "cpu" else self._device,
        )
        for num_bytes in self.sizes:
            self._begin(f"an all-reduce of {_shown(num_bytes)}")
            rates.append(_bus_rate(num_bytes, self._device, self._rank, list(range(self._world_size))))

    def _guarded(self, work: Callable[[list[float]], None]) -> Outcome:
        """Do it on a thread, as long as it comes forward."""
        rates: list[float] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                work(rates)
            except Exception as error:
                errors.append(error)

        self._begin(CONNECT)
        thread = threading.Thread(target=run, name="preflight", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() - self._since_s < self._limits.collective_s:
            thread.join(POLL_S)
        done = list(rates)
        if thread.is_alive():
            return Outcome(self._host, done, self._doing)
        if errors:
            reason = message_of(errors[0]).strip() or type(errors[0]).__name__
            return Outcome(self._host, done, self._doing, reason.splitlines()[0])
        return Outcome(self._host, done)

    def _begin(self, doing: str) -> None:
        self._doing, self._since_s = doing, time.monotonic()

    # ---- node by node ---------------------------------------------------------------------------------------

    def _find_slow(self, rate: float, firsts: Sequence[tuple[int, str]]) -> None:
        """Refuse the rate, and name the nodes that are slow with both neighbours."""
        outcome = Outcome(self._host)
        if len(firsts) > 2:
            outcome = self._guarded(lambda rates: self._neighbours([rank for rank, _ in firsts], rates))
        wanted = self._limits.min_all_reduce_gb_per_s
        told = (
            f"an all-reduce of {_shown(self.sizes[-1])} has {rate / 1e9:.3g} GB/s, and min_all_reduce_gb_per_s is "
            f"{wanted:g}"
        )
        hosts = dict(firsts)

        def judged(said: Mapping[int, str]) -> list[str]:
            rates = {hosts[rank]: Outcome.of_json(text).rates for rank, text in said.items() if rank in hosts}
            if slow := slow_nodes(rates):
                return [
                    f"{told}: {', '.join(slow)} under half as fast as the others: look at the network there"
                ]
            return [f"{told}: look at the links and at `interface` in the cluster file, or lower the limit"]

        self._meeting.conclude("neighbours", outcome.as_json(), judged)

    def _neighbours(self, ranks: Sequence[int], rates: list[float]) -> None:
        """Measure each node with the next one, in a ring, pairs that share none at the same time."""
        pairs = [sorted((rank, ranks[(number + 1) % len(ranks)])) for number, rank in enumerate(ranks)]
        last = [pairs.pop()] if len(pairs) % 2 else []
        for pair in [*pairs[::2], *pairs[1::2], *last]:
            self._begin(f"an all-reduce of {_shown(CPU_BYTES[-1])} between two nodes")
            group = dist.new_group(pair)  # every rank takes part in making it
            if self._rank in pair:
                rates.append(_bus_rate(CPU_BYTES[-1], self._device, self._rank, pair, group))


def _bus_rate(
    num_bytes: int,
    device: torch.device,
    rank: int,
    ranks: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> float:
    """Reduce, see that the sums are right, and give bytes/s on the bus: 2 (n - 1) / n of the size per second.

    The convention is that of NVIDIA's nccl-tests.
    """
    tensor = torch.empty(num_bytes // FP32_BYTES, device=device)
    expected = float(sum(one % 8 + 1 for one in ranks))  # small: exact in fp32
    times_s = []
    for _ in range(1 + NUM_TIMED):  # the first connects
        tensor.fill_(float(rank % 8 + 1))
        _wait(device)
        begun_s = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _wait(device)
        times_s.append(time.perf_counter() - begun_s)
        if not bool((tensor == expected).all()):
            raise RuntimeError("its sums are wrong; a network card, a cable or a GPU is broken")
    return num_bytes / min(times_s[1:]) * 2 * (len(ranks) - 1) / len(ranks)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shown(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
