"""What a run's records warn of: each finding with its evidence and what to do. Pure functions; imports no torch.

A finding must be sure enough to act on: every rule asks for more than the noise of the curve that it looks at.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .figures import duration, smoothed
from .phases import intervals
from .records import Curve, Record, RunRecords, number
from .summary import Summary, Totals, metered_share, summarise

MIN_LINES = 30  # of a curve that is judged
MIN_RISE = 0.005  # of the best held-out loss; and the least fall of one that counts
MIN_LATER = 2  # evaluations after the best
MIN_PROGRESS = 0.001  # of the loss, between the halves of the last third, beyond the noise
CLEAR_PROGRESS = 0.01  # what the noise must not be able to hide
MIN_RATE = 0.1  # of the largest learning rate: below it a loss is meant to settle
SURE = 2.0  # standard errors
SPIKE_DEVIATIONS = 8.0
SPIKE_SPAN = 30.0  # lines
MAX_DATA_WAIT = 0.1
MIN_GOODPUT = 0.8
LONG_S = 600.0  # a start is not yet most of it
LONG_LOSS_S = 60.0
GOODPUT_ACTIONS = {
    "lost work": "Save more often (checkpoint.every_steps, checkpoint.every_minutes), and look at why attempts ended.",
    "evaluations": "Evaluate less often (evaluate.every_steps), or on fewer tokens (evaluate.max_tokens).",
    "saves": "Save less often, or while training goes on (checkpoint.asynchronous), or to a faster disk.",
    "starts and the rest": "Starts cost most: see what a start waits for, and let attempts last longer.",
}
UNREAD = "unread files"


@dataclass(frozen=True)
class Advice:
    """One finding. `serious` tells what spoils or slows the run from what is only not known."""

    kind: str
    title: str
    evidence: str
    action: str
    serious: bool = True


def advise(records: RunRecords, summary: Summary | None = None) -> list[Advice]:
    """Give all findings of a run, the serious ones first."""
    summary = summary or summarise(records)
    loss, heldout = records.curve("loss"), records.heldout()
    not_finite = sum("loss" in line and number(line, "loss") is None for line in records.steps)
    found = [
        *failed_start(records),
        *overfitting(loss, heldout),
        *stall(loss, records.curve("lr"), heldout),
        *spikes(loss, not_finite),
        *data_wait(records.steps),
        *low_goodput(summary, records.steps),
        *partial_energy(records.ledger),
        *doubtful_energy(summary),
        *unknown_mfu(records.steps),
        *unread_files(records.problems),
    ]
    return sorted(found, key=lambda one: not one.serious)


def failed_start(records: RunRecords) -> list[Advice]:
    """Say why there is nothing of a run."""
    if records.steps or records.end is None or records.end[0] != "FAILED":
        return []
    return [
        Advice(
            "failed start",
            "The run failed before its first step",
            records.end[1],
            "Put that right and give the same command again.",
        )
    ]


def overfitting(train: Curve, heldout: Mapping[str, Curve]) -> list[Advice]:
    """Find held-out sets whose loss has risen from its best while the training loss went on falling."""
    found = []
    for name, curve in heldout.items():
        if len(curve) < MIN_LATER + 1:
            continue
        best = min(range(len(curve)), key=lambda i: curve[i][1])
        (best_step, lowest), later = curve[best], [loss for _, loss in curve[best + 1 :]]
        rises = len(later) >= MIN_LATER and min(later[-MIN_LATER:]) > lowest + MIN_RISE * abs(lowest)
        fall = _fall_since(train, best_step)
        if not rises or fall is None:
            continue
        found.append(
            Advice(
                "overfitting",
                f"Overfitting: the loss held out in {name} rises",
                f"Best at step {best_step:,.0f} with {lowest:.4f}, {later[-1]:.4f} at step {curve[-1][0]:,.0f} "
                f"(+{(later[-1] - lowest) / abs(lowest):.1%}), while the training loss fell from {fall[0]:.4f} to "
                f"{fall[1]:.4f}.",
                f"Take the checkpoint nearest to step {best_step:,.0f}; for the next run more data or fewer epochs, "
                "dropout or weight decay, or a smaller model.",
            )
        )
    return found


def _fall_since(train: Curve, step: float) -> tuple[float, float] | None:
    """Give the mean training loss around a step and at the end, where it fell by more than the noise."""
    before = [loss for at, loss in train if at <= step]
    after = [loss for at, loss in train if at > step]
    if len(before) < 3 or len(after) < 3:
        return None
    size = max(3, min(len(before), len(after)) // 2)
    old, new = before[-size:], after[-size:]
    fall = statistics.fmean(old) - statistics.fmean(new)
    return (statistics.fmean(old), statistics.fmean(new)) if fall > SURE * _error(old, new) else None


def _error(one: Sequence[float], other: Sequence[float]) -> float:
    """Give the standard error of the difference of two means."""
    return float((statistics.variance(one) / len(one) + statistics.variance(other) / len(other)) ** 0.5)


def stall(train: Curve, rate: Curve, heldout: Mapping[str, Curve]) -> list[Advice]:
    """Find a training loss that made no progress over the last third, with a learning rate that is not near 0.

    A held-out loss that went on falling shows progress that the noise of the training loss hides.
    """
    third = train[-(len(train) // 3) :]
    if len(train) < MIN_LINES:
        return []
    start = third[0][0]
    rates = [value for step, value in rate if step >= start]
    largest = max((value for _, value in rate), default=0.0)
    if rates and statistics.median(rates) < MIN_RATE * largest:
        return []
    if any(_falls_from(curve, start) for curve in heldout.values()):
        return []
    losses = [loss for _, loss in third]
    first, second = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    level, fall = statistics.fmean(first), statistics.fmean(first) - statistics.fmean(second)
    error, least, clear = SURE * _error(first, second), MIN_PROGRESS * abs(level), CLEAR_PROGRESS * abs(level)
    rises = -fall > 2 * error + least
    if not rises and (fall - error >= least or fall + error >= clear or error >= clear):
        return []
    shown = f" at a learning rate of {statistics.median(rates):.2g}" if rates else ""
    return [
        Advice(
            "stall",
            "The training loss rises" if rises else "The training loss stands still",
            f"From step {start:,.0f} to {third[-1][0]:,.0f} its mean went from {level:.4f} to "
            f"{statistics.fmean(second):.4f} (give or take {error:.4f}){shown}.",
            "Let the learning rate decay now, or stop here; where the loss is far above what this size should reach, "
            "look at the learning rate, the data mix and the held-out curves.",
        )
    ]


def _falls_from(curve: Curve, step: float) -> bool:
    """Tell whether a held-out loss ends lower than all that came before a step."""
    before = [loss for at, loss in curve if at <= step]
    return bool(before) and curve[-1][1] < min(before) - MIN_RISE * abs(min(before))


def spikes(train: Curve, num_not_finite: int = 0) -> list[Advice]:
    """Find lines whose loss lies far above the smoothed loss before them, and lines that have no finite loss."""
    peaks = _peaks(train)
    evidence = []
    if peaks:
        step, loss, expected, deviations = max(peaks, key=lambda peak: peak[3])
        evidence.append(
            f"The largest at step {step:,.0f}: {loss:.4f} where {expected:.4f} was expected, {deviations:.0f} "
            f"deviations above."
        )
    if num_not_finite:
        evidence.append(f"{num_not_finite:,} line(s) have no finite loss.")
    if not evidence:
        return []
    return [
        Advice(
            "spikes",
            f"The training loss spiked {len(peaks)} time(s)" if peaks else "The training loss was not finite",
            " ".join(evidence),
            "Compare with the gradient norm and the events at these steps; lower optimizer.lr or "
            "optimizer.clip, lengthen schedule.warmup_steps, or look at the data there.",
        )
    ]


def _peaks(train: Curve) -> list[tuple[float, float, float, float]]:
    """Give (step, loss, expected, deviations) of the highest line of each spike.

    Mean and deviation are of the lines before; a line beyond 3 deviations counts as one at 3, so that a spike does
    not hide the next one.
    """
    peaks: list[tuple[float, float, float, float]] = []
    keep, inside = 1 - 1 / SPIKE_SPAN, False
    mean = deviation = 0.0
    for i, (step, loss) in enumerate(train):
        if i < MIN_LINES:
            mean, deviation = (
                _warmed_up([value for _, value in train[: i + 1]]) if i + 1 == MIN_LINES else (0.0, 0.0)
            )
            continue
        height = (loss - mean) / deviation if deviation > 0 else 0.0
        if height > SPIKE_DEVIATIONS and not inside:
            peaks.append((step, loss, mean, height))
        elif inside and height > peaks[-1][3]:
            peaks[-1] = (step, loss, mean, height)
        inside = height > SPIKE_DEVIATIONS / 2 if inside else height > SPIKE_DEVIATIONS
        offset = max(-3.0, min(3.0, height)) * deviation
        mean += (1 - keep) * offset
        deviation = max((keep * deviation**2 + (1 - keep) * offset**2) ** 0.5, 1e-4 * abs(mean))
    return peaks


def _warmed_up(losses: Sequence[float]) -> tuple[float, float]:
    """Give the mean of the first lines, and their deviation from their own course."""
    means = smoothed(losses, SPIKE_SPAN / 3)
    rest = [abs(loss - mean) for loss, mean in zip(losses, means, strict=True)]
    return means[-1], max(1.48 * statistics.median(rest), 1e-4 * abs(means[-1]))


def data_wait(steps: Sequence[Record]) -> list[Advice]:
    """Find a run whose steps wait for data; its first line, in which readers start, does not count."""
    lines = [line for line in intervals(steps) if line.phases_s][1:]
    all_s = sum(
        line.seconds - line.phases_s.get("evaluate", 0.0) - line.phases_s.get("checkpoint", 0.0)
        for line in lines
    )
    waited_s = sum(line.phases_s.get("data", 0.0) for line in lines)
    if all_s <= 0 or waited_s <= MAX_DATA_WAIT * all_s:
        return []
    return [
        Advice(
            "data",
            f"Steps wait for data {waited_s / all_s:.0%} of their time",
            f"{duration(waited_s)} of {duration(all_s)} in steps {lines[0].first_step + 1:,.0f} to "
            f"{lines[-1].step:,.0f}.",
            "Raise data.workers or reading.threads, keep remote shards in a cache, or bring them nearer.",
        )
    ]


def low_goodput(summary: Totals, steps: Sequence[Record]) -> list[Advice]:
    """Find a run that spent much of its time on something else than training its present weights.

    A short one that lost nothing is left alone: it is mostly its start.
    """
    wall_s, train_s, lost_s = summary.wall_s, summary.train_s, summary.wasted_s or 0.0
    if summary.goodput is None or summary.goodput >= MIN_GOODPUT or not wall_s or train_s is None:
        return []
    if wall_s < LONG_S and lost_s < LONG_LOSS_S:
        return []
    spent_s = {"lost work": lost_s, "evaluations": 0.0, "saves": 0.0}
    for line in intervals(steps):
        spent_s["evaluations"] += line.phases_s.get("evaluate", 0.0)
        spent_s["saves"] += line.phases_s.get("checkpoint", 0.0)
    spent_s["starts and the rest"] = max(0.0, wall_s - train_s - spent_s["evaluations"] - spent_s["saves"])
    parts = ", ".join(f"{seconds / wall_s:.0%} {name}" for name, seconds in spent_s.items())
    most = max(spent_s, key=lambda name: spent_s[name])
    return [
        Advice(
            "goodput",
            f"Goodput is {summary.goodput:.0%}",
            f"So much of the wall time trained the present weights. Of {duration(wall_s)}: {parts}.",
            GOODPUT_ACTIONS[most],
        )
    ]


def partial_energy(ledger: Record) -> list[Advice]:
    """Find a sum of joules that leaves hosts or attempts out."""
    hosts, all_hosts = number(ledger, "hosts"), number(ledger, "all_hosts")
    share, missing = metered_share(ledger), ""
    if hosts and all_hosts is not None and hosts < all_hosts:
        missing = f"{hosts:.0f} of {all_hosts:.0f} hosts metered"
    elif number(ledger, "joules") is not None and share < 0.99:
        missing = f"{share:.0%} of the tokens were metered, some attempts read nothing"
    if not missing:
        return []
    return [
        Advice(
            "partial energy",
            f"Energy is partial: {missing}",
            "Joules, CO2e and cost leave the others out.",
            "Give the run the right to read the counters there (the start of the run says what could not be read), or "
            "set meter.watts.",
        )
    ]


def doubtful_energy(summary: Summary) -> list[Advice]:
    """Say where energy is estimated or not known."""
    if summary.joules is not None and summary.source == "user-watts":
        watts = "" if summary.watts is None else f" ({summary.watts:,.0f} W in all)"
        return [
            Advice(
                "estimated energy",
                "Energy is an estimate",
                f"It is meter.watts{watts} times the time; nothing was metered.",
                "Run where NVML or RAPL can be read, or check the figure by a wall meter.",
                serious=False,
            )
        ]
    if summary.joules is None and summary.step is not None:
        return [
            Advice(
                "unknown energy",
                "Energy is not known",
                "No counter could be read and meter.watts is not set.",
                "Set meter.watts for an estimate, or give the run the right to read a counter.",
                serious=False,
            )
        ]
    return []


def unknown_mfu(steps: Sequence[Record]) -> list[Advice]:
    """Say where no line has an MFU."""
    if not steps or any(number(line, "mfu") is not None for line in steps):
        return []
    return [
        Advice(
            "unknown MFU",
            "MFU is not known",
            "No peak is known for the device.",
            "Set meter.peak_tflops to the dense peak of one device.",
            serious=False,
        )
    ]


def unread_files(problems: Sequence[str]) -> list[Advice]:
    """Say what of the run's files is missing or cannot be read."""
    if not problems:
        return []
    return [
        Advice(
            UNREAD,
            "Not all files of the run can be read",
            "; ".join(problems) + ".",
            "What they would tell is n/a here, or comes from the last line of metrics.jsonl. A killed run leaves one "
            "torn line a file; where there are more, look at the disk.",
            serious=False,
        )
    ]
