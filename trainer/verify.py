"""Prove that every layout computes what one process computes: `basestone verify`.

From one seed, a serial reference trains a few steps on the run's own model and data; then each layout does, on the
same global batches. Losses and gradient norms are compared as numbers, gradients and updates parameter by parameter
under their global names. Ranks are forked from this process, so a layout costs no new start of torch.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..model.families import layout_of
from ..model.pipeline import chunks_of_ranks, held_by
from . import runtime as processes
from .config import ResolvedRun, RunConfig
from .ds_config import deepspeed_config
from .engine import Engine
from .errors import ConfigError
from .feed import Feed
from .forks import run_ranks, threads_each
from .layouts import Layout
from .places import DataPlaces, vocab_size
from .sections import ScheduleSection
from .step import TrainingStep
from .trace import Difference, PieceWatch, Trace

EPSILON = 1e-5
LEAST_TEMPERATURE = 1.0  # of pairs: a smaller one multiplies the rounding of cosines
LARGEST_LR = 1e-3  # with larger ones rounding grows from step to step beyond any tolerance
GRADIENT_FLOOR = 1e-3  # of the model's largest gradient: under it, a parameter's own largest is rounding noise


class Tolerance(NamedTuple):
    """Largest relative differences from the serial run that still count as equal."""

    loss: float
    norm: float
    tensor: float  # of a parameter's gradient and update


# In fp32 only the order of additions differs between layouts. bf16 keeps 8 bits: a layout that cuts or regroups a
# matrix product rounds its activations elsewhere, and every weight that rounds the other way is off by 2^-8.
TOLERANCES = {"fp32": Tolerance(1e-5, 1e-5, 1e-5), "bf16": Tolerance(1e-3, 1e-2, 5e-2)}
# Before any update, a pipeline sees the serial run's bf16 numbers, and adds them up in fp32.
SAME_ARITHMETIC_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """How one layout compares: the largest relative differences over all steps.

    `first` names where the first miss was seen: the step (from 1), then the parameter, or the number and the worst
    gradient.
    """

    layout: str
    equal: bool
    loss: float
    norm: float
    gradient: float
    update: float
    first: str
    seconds: float


class _Reference(NamedTuple):
    losses: list[float]
    norms: list[float]
    largest: list[dict[str, tuple[float, float]]]  # of each step and parameter: its gradient and root


class Verification:
    """One model, one set of batches, one serial reference; any number of layouts to compare with it."""

    def __init__(
        self, run: RunConfig, places: DataPlaces, *, num_processes: int, steps: int, dtype: str
    ) -> None:
        """Cut the run down to what is compared: so many steps, a small batch, no dropout.

        A step takes two micro-batches of one sequence on each rank of a purely data-parallel layout, and more on
        others. Masks of dropout depend on the layout by design. AdamW's epsilon is raised: at 1e-8 it makes whole
        steps of gradients that are rounding noise, and after two steps the noise is ten times as large; so is the
        temperature of pairs. The rate is constant: in a warm-up updates are smaller than the spacing of fp32 values,
        and decay would not be seen.
        """
        temperature = max(LEAST_TEMPERATURE, run.model.temperature)
        optimizer = {"eps": max(EPSILON, run.optimizer.eps), "lr": min(LARGEST_LR, run.optimizer.lr)}
        train = {
            "dtype": dtype,
            "global_batch": 2 * num_processes,
            "micro_batch": 1,
            "ramp": (),
            "tokens": None,
        }
        self._run = run.model_copy(
            update={
                "model": run.model.model_copy(update={"dropout": 0.0, "temperature": temperature}),
                "optimizer": run.optimizer.model_copy(update=optimizer),
                "schedule": ScheduleSection(kind="constant"),
                "data": run.data.model_copy(update={"lanes": None}),  # they divide the run's own batch
                "train": run.train.model_copy(update={**train, "steps": max(steps, run.train.steps or 0)}),
            }
        )
        self._places, self._steps, self._dtype = places, steps, dtype
        self._num_processes, self._vocab = num_processes, vocab_size(places)
        # A serial run rounds what the users of a shared weight give it together, two stages each for itself.
        self._tied = {"embed.word.weight"} if run.model.tied_head else set()

    def problems(self, layout: Layout) -> str:
        """Say what makes a layout illegal for this run; nothing where it is legal."""
        try:
            deepspeed_config(layout.of(self._run).resolve(layout.processes, self._vocab))
        except ConfigError as error:
            return str(error)
        return ""

    def run(self, layouts: Sequence[Layout]) -> Iterator[Verdict]:
        """Run the reference, then each layout; give each verdict as it is reached."""
        with tempfile.TemporaryDirectory(prefix="basestone-verify-") as folder:
            serial = Layout(zero=0 if self._dtype == "fp32" else 1)
            # As many threads as a rank of a layout has: torch's layer norm adds up a bf16 gradient in a part for each.
            threads = threads_each(self._num_processes)
            task = (self._resolved(serial), self._places, Path(folder), self._steps)
            reference = _Reference(*run_ranks(_record, 1, *task, num_threads=threads)[0])
            for layout in layouts:
                yield self._compare(layout, reference, Path(folder))

    def _resolved(self, layout: Layout) -> ResolvedRun:
        return layout.of(self._run).resolve(layout.processes, self._vocab)

    def _compare(self, layout: Layout, reference: _Reference, folder: Path) -> Verdict:
        started_s = time.perf_counter()
        try:
            ranks = run_ranks(
                _measure, layout.processes, self._resolved(layout), self._places, folder, self._steps
            )
        except Exception as error:
            text = f"failed: {type(error).__name__}: {error}"
            nan = math.nan
            return Verdict(str(layout), False, nan, nan, nan, nan, text, time.perf_counter() - started_s)
        return self._judge(layout, reference, ranks, time.perf_counter() - started_s)

    def _uncovered(self, layout: Layout, ranks: list[Any]) -> str:
        """Name the first parameter whose pieces on all ranks do not make up its copies; nothing where all do."""
        replicas = layout.data if layout.zero == 0 else 1  # ZeRO cuts what they would all hold
        model, parallel = self._resolved(layout).run.model, layout.of(self._run).parallel
        table, counts = layout_of(model), parallel.pipeline_layers
        stages = chunks_of_ranks(model.total_layers, layout.pipeline, layout.virtual_pipeline, counts)
        copies = Counter(row.name for chunks in stages for row in held_by(table, chunks, tied=model.tied_head))
        for name, row in table.items():
            expected = math.prod(row.local_shape(layout.tensor)) * layout.tensor * replicas * copies[name]
            compared = sum(rank[0][2][name].numel for rank in ranks if name in rank[0][2])
            if compared != expected:
                return f"step 1: {compared} elements of {name} are there on all ranks, not {expected}"
        return ""

    def _judge(self, layout: Layout, reference: _Reference, ranks: list[Any], seconds: float) -> Verdict:
        first = self._uncovered(layout, ranks)
        table = layout_of(self._resolved(layout).run.model)
        limits, worst = TOLERANCES[self._dtype], dict.fromkeys(("loss", "norm", "gradient", "update"), 0.0)
        for step in range(self._steps):
            loss, norm = ranks[0][step][:2]
            found = {
                ("loss", "the loss"): (_relative(loss, reference.losses[step]), limits.loss),
                ("norm", "the gradient norm"): (_relative(norm, reference.norms[step]), limits.norm),
            }
            same = self._dtype != "fp32" and step == 0 and layout.tensor * layout.data == 1 and layout.zero < 3
            # Clipping carries a difference of the norm into every gradient.
            same_limit = SAME_ARITHMETIC_TOLERANCE + found["norm", "the gradient norm"][0]
            shared = self._tied | {name for name, row in table.items() if row.per_stage}
            model_gradient = max(gradient for gradient, _ in reference.largest[step].values())
            model_root = max(root for _, root in reference.largest[step].values())
            for name, (gradient, root) in reference.largest[step].items():
                pieces = [rank[step][2][name] for rank in ranks if name in rank[step][2]]
                limit = same_limit if same and name not in shared else limits.tensor
                apart = _worst(piece.gradient for piece in pieces) / max(
                    gradient, GRADIENT_FLOOR * model_gradient
                )
                found["gradient", f"the gradient of {name}"] = apart, limit
                lr = ranks[0][step][3]
                apart = _worst(piece.update for piece in pieces) / (lr * max(root, GRADIENT_FLOOR * model_root))
                found["update", f"the update of {name}"] = apart, limit
            for (kind, _), (apart, _) in found.items():
                worst[kind] = _worst((worst[kind], apart))
            first = first or _first_miss(step, found)
        return Verdict(str(layout), not first, **worst, first=first, seconds=seconds)


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected) if expected else abs(value)


def _first_miss(step: int, found: dict[tuple[str, str], tuple[float, float]]) -> str:
    """Name the first miss; a number of the whole model does not tell where, so the worst gradient follows it.

    Not one that is off as far as the norm is: clipping carries that into every gradient.
    """
    misses = {key: apart for key, (apart, bound) in found.items() if not apart <= bound}
    if not misses:
        return ""

    def text(key: tuple[str, str]) -> str:
        return f"{key[1]} is off by {found[key][0]:.1e} (limit {found[key][1]:.0e})"

    first = next(iter(misses))
    clipped = 2 * found["norm", "the gradient norm"][0]
    gradients = [key for key in misses if key[0] == "gradient" and not misses[key] <= clipped]
    if first[0] in ("loss", "norm") and gradients:
        worst = max(gradients, key=lambda key: math.inf if math.isnan(misses[key]) else misses[key])
        return f"step {step + 1}: {text(first)}; at worst {text(worst)}"
    return f"step {step + 1}: {text(first)}"


def _worst(values: Iterable[float]) -> float:
    """Give the largest; what is not a number is worse than any, and what no rank holds is infinitely far off."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=math.inf)


def _steps(
    resolved: ResolvedRun, places: DataPlaces, num_steps: int
) -> Iterator[tuple[int, Any, PieceWatch, Any]]:
    """Train on this rank; give each step's number, its figures, the watch over its fragments and the runtime."""
    run, parallel = resolved.run, resolved.run.parallel
    runtime = processes.start(
        tensor=parallel.tensor, pipeline=parallel.pipeline, virtual_pipeline=parallel.virtual_pipeline
    )
    engine = Engine(resolved, runtime)
    feed = Feed(resolved, places, runtime)
    feed.start(workers=0)
    training_step = TrainingStep(engine, resolved, runtime, feed)
    watch = PieceWatch(engine.state, run.optimizer)
    for step in range(num_steps):
        yield step, training_step.run(step), watch, runtime
    engine.close()


def _record(
    resolved: ResolvedRun, places: DataPlaces, folder: Path, num_steps: int
) -> tuple[list[float], list[float], list[dict[str, tuple[float, float]]]]:
    trace = Trace(folder, layout_of(resolved.run.model))
    losses, norms, largest = [], [], []
    for step, figures, watch, _ in _steps(resolved, places, num_steps):
        losses.append(figures.loss)
        norms.append(figures.grad_norm)
        largest.append(trace.write(step, watch.pieces()))
    return losses, norms, largest


def _measure(
    resolved: ResolvedRun, places: DataPlaces, folder: Path, num_steps: int
) -> list[tuple[float, float, dict[str, Difference], float]]:
    trace = Trace(folder, layout_of(resolved.run.model))
    return [
        (
            figures.loss,
            figures.grad_norm,
            trace.differences(step, watch.pieces(), runtime.tp_rank, runtime.tp_size),
            figures.lr,
        )
        for step, figures, watch, runtime in _steps(resolved, places, num_steps)
    ]


HEADER = f"{'layout':<26}{'loss':>10}{'norm':>10}{'gradient':>10}{'update':>10}  {'verdict':<8}{'seconds':>8}"


def row(verdict: Verdict) -> str:
    """Give a line of the table: largest relative differences over all steps, and what was seen first."""
    apart = "".join(
        f"{value:>10.1e}" for value in (verdict.loss, verdict.norm, verdict.gradient, verdict.update)
    )
    word = "equal" if verdict.equal else "DIFFERS"
    return f"{verdict.layout:<26}{apart}  {word:<8}{verdict.seconds:>8.1f}" + (
        f"\n  {verdict.first}" if verdict.first else ""
    )


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Give a verdict for machines; differences that are not numbers are null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(verdict).items()
    }
