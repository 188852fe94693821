"""What the ranks of bench/checkpoint.py do: saves and loads of one model, ours and DeepSpeed's, each timed."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from basestone.model.families import layout_of
from basestone.trainer import runtime as processes
from basestone.trainer.batch import causal_fields, cut
from basestone.trainer.checkpoint.format import BLOCK_BYTES, steps_in
from basestone.trainer.checkpoint.restorer import Restorer
from basestone.trainer.checkpoint.saver import Saver
from basestone.trainer.config import ResolvedRun
from basestone.trainer.engine import Engine
from basestone.trainer.runtime import Runtime
from basestone.trainer.sections import CheckpointSection

Rows = dict[str, list[float]]  # of each measurement: seconds or bytes, the first one first
# What DeepSpeed's conversion must be told of Megatron-core's layers: it has no other way to know how pieces join.
# Everything that is named nowhere is joined along its first dimension.
UNIVERSAL_INFO = {
    "universal_checkpoint_info": {
        "universal_checkpoint_version": 0.2,
        "tp_replicated_parameter_patterns": [r".*layernorm\.weight", r"norm\.weight"],
        "parameter_with_row_parallelism_patterns": [r".*linear_proj\.weight", r".*linear_fc2\.weight"],
        "parameter_with_2_sub_params_cat_dim_0": [r".*linear_fc1\.weight"],
    }
}


def status_bytes(field: str) -> int:
    """Give a figure of this process from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@contextmanager
def peak_bytes(into: list[float], level: int | None = None) -> Iterator[None]:
    """Append the highest resident memory of this process over a level; by default over what it has now."""
    level = status_bytes("VmRSS") if level is None else level
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
    yield
    into.append(float(status_bytes("VmHWM") - level))


def drop_cache(folder: Path) -> None:
    """Write files out and let the kernel forget their pages, so that a read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _without_nothing(_: Any, state: dict[str, Any], *__: Any) -> None:
    """Take out Megatron-core's `_extra_state`, which is None here: DeepSpeed's conversion fails on it."""
    for name in [name for name, value in state.items() if value is None]:
        del state[name]


class Bench:
    """One rank with an engine that trains, and the ways to save it."""

    def __init__(self, resolved: ResolvedRun, folder: Path) -> None:
        """Build the engine and train a step, which makes everything that is made once."""
        parallel = resolved.run.parallel
        self.runtime: Runtime = processes.start(tensor=parallel.tensor)
        self.engine = Engine(resolved, self.runtime)
        self.deepspeed: Any = self.engine._engine
        self.table = layout_of(self.engine.model)
        self.folder, self.rows = folder, Rows()
        self._length = resolved.run.data.sequence_length
        self._vocab = resolved.run.model.vocab_size or 1
        self.saves = 0
        self.engine.module.register_state_dict_post_hook(_without_nothing)
        self.train_step()

    def row(self, name: str) -> list[float]:
        """Give the figures of a measurement."""
        return self.rows.setdefault(name, [])

    def all_begin(self) -> float:
        """Let all ranks begin together; give the time."""
        dist.barrier(group=self.runtime.control)
        return time.perf_counter()

    def train_step(self, before_update: Callable[[], None] = lambda: None) -> float:
        """Run a step; give its seconds."""
        started_s = time.perf_counter()
        tokens = torch.randint(0, self._vocab, (1, self._length + 1), dtype=torch.int32)
        dist.broadcast(tokens, src=0, group=self.runtime.control)
        batches = cut(causal_fields(tokens, torch.ones(1, self._length)), 1)
        loss = self.engine.forward_backward(batches, {"next_token": float(self._length)})
        before_update()
        self.engine.update(1e-4)
        dist.all_reduce(loss)
        return time.perf_counter() - started_s

    def saver(self, *, asynchronous: bool) -> Saver:
        """Make one of ours that keeps one checkpoint."""
        name = "asynchronous" if asynchronous else "synchronous"
        section = CheckpointSection(keep_last=1)
        run_dir = self.folder / name
        run_dir.mkdir(exist_ok=True)
        return Saver(run_dir, self.table, self.runtime, self.engine.state, section, asynchronous=asynchronous)

    def save(self, saver: Saver) -> float:
        """Save, and wait; give the seconds. The save before it is removed beforehand, like DeepSpeed's."""
        if self.runtime.rank == 0:
            for _, path in steps_in(saver.directory):
                shutil.rmtree(path)
        started_s, state = self.all_begin(), self._state()
        outcome = saver.begin(self.saves, state, wait=True)
        assert outcome is not None and outcome.problem is None, outcome
        return time.perf_counter() - started_s

    def _state(self) -> dict[str, Any]:
        self.saves += 1
        return {"step": self.saves, "optimizer_steps": self.engine.state.steps}

    def save_beside_training(self, saver: Saver) -> None:
        """Save while steps go on; note how long begin and copy blocked, the slowdown, and the whole save.

        The slowdown is against steps just before and just after.
        """
        plain = [self.train_step() for _ in range(2)]
        started_s, state = self.all_begin(), self._state()
        outcome = saver.begin(self.saves, state)
        assert outcome is None
        steps = 0
        while outcome is None:
            self.train_step(saver.wait_copied)
            steps += 1
            if not any(self.runtime.gather_all(saver.working)):
                outcome = saver.advance()
        assert outcome.problem is None, outcome
        whole_s = time.perf_counter() - started_s
        self.row("async blocked").append(outcome.blocked_s)
        plain += [self.train_step() for _ in range(2)]
        self.row("async slowdown").append(whole_s - steps * statistics.mean(plain))
        self.row("async steps").append(steps)
        self.row("step").append(statistics.mean(plain))
        self.row("async total").append(outcome.total_s)

    def save_by_deepspeed(self) -> None:
        """Save as DeepSpeed does; note the seconds until it returns, and until its files are on the disk."""
        place = self.folder / "deepspeed"
        if self.runtime.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
        started_s = self.all_begin()
        self.deepspeed.save_checkpoint(str(place), tag="step", client_state=UNIVERSAL_INFO)
        dist.barrier(group=self.runtime.control)
        self.row("deepspeed").append(time.perf_counter() - started_s)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        self.row("deepspeed bytes").append(float(sum(path.stat().st_size for path in files)))
        for path in files[self.runtime.rank :: self.runtime.world_size]:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        dist.barrier(group=self.runtime.control)
        self.row("deepspeed synced").append(time.perf_counter() - started_s)

    def write_raw(self, num_bytes: int) -> None:
        """Write the blocks of this rank's file, two at a time past the page cache: what the disk gives."""
        block, path = mmap.mmap(-1, BLOCK_BYTES), self.folder / f"raw-{self.runtime.rank}"
        block.write(os.urandom(BLOCK_BYTES))
        started_s = self.all_begin()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda start: os.pwrite(file, block, start), range(0, num_bytes, BLOCK_BYTES)))
        os.fsync(file)
        os.close(file)
        dist.barrier(group=self.runtime.control)
        self.row("raw").append(time.perf_counter() - started_s)
        path.unlink()


def saves(resolved: ResolvedRun, folder: Path, rounds: int) -> tuple[Rows, int]:
    """Save in every way, in turns; give this rank's figures, and the bytes of its file."""
    bench = Bench(resolved, folder)
    synchronous = bench.saver(asynchronous=False)
    share = sum(fragment.numel * 12 for fragment in bench.engine.state.fragments() if fragment.owned)
    quiet: list[float] = []
    with peak_bytes(quiet):
        for _ in range(2):
            bench.train_step()
    level = status_bytes("VmRSS")
    asynchronous = bench.saver(asynchronous=True)
    for number in range(rounds):
        # In either order: whoever comes second writes through pages that the first one has touched.
        for is_raw in (number % 2 == 0, number % 2 == 1):
            if is_raw:
                bench.write_raw(share)
            else:
                with peak_bytes(bench.row("sync peak")):
                    bench.row("sync").append(bench.save(synchronous))
        with peak_bytes(bench.row("async peak"), level + int(quiet[0])):
            bench.save_beside_training(asynchronous)
        with peak_bytes(bench.row("deepspeed peak")):
            bench.save_by_deepspeed()
    bench.save(synchronous)  # of what DeepSpeed saved last
    return bench.rows, share


def load(resolved: ResolvedRun, folder: Path) -> tuple[float, float, float]:
    """Load our checkpoint; give seconds, the highest memory meanwhile, and the checksum of what was loaded."""
    bench, peaks = Bench(resolved, folder), list[float]()
    restorer = Restorer(folder / "synchronous", bench.table, bench.runtime, bench.engine.state)
    drop_cache(folder / "synchronous")
    with peak_bytes(peaks):
        started_s = bench.all_begin()
        assert restorer.restore(lambda _: []) is not None
        seconds = time.perf_counter() - started_s
    return seconds, peaks[0], checksum(bench.engine)


def load_by_deepspeed(resolved: ResolvedRun, folder: Path) -> tuple[float, float, float]:
    """Load the converted checkpoint likewise."""
    bench, peaks = Bench(resolved, folder), list[float]()
    drop_cache(folder / "universal")
    with peak_bytes(peaks):
        started_s = bench.all_begin()
        place, _ = bench.deepspeed.load_checkpoint(str(folder / "universal"), tag="step")
        seconds = time.perf_counter() - started_s
    assert place is not None, "DeepSpeed loaded nothing"
    return seconds, peaks[0], checksum(bench.engine)


def checksum(engine: Engine) -> float:
    """Give a sum over all masters and states that a piece in the wrong place changes."""
    total = 0.0
    for fragment in engine.state.fragments():
        weights = torch.linspace(0.5, 1.5, fragment.numel, dtype=torch.float64)
        total += sum(float((tensor.double() * weights).abs().sum()) for tensor in fragment.tensors.values())
    return total
