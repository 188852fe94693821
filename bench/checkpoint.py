"""Saves and loads beside DeepSpeed's own, on the same engine with the same model, and beside the disk alone.

    python bench/checkpoint.py [--parameters 500e6] [--rounds 3] [--dir DIR]

A Llama in bf16 with fp32 masters under ZeRO-1, as one process and as TP 2 x DP 2. The bytes on this machine are, for
every parameter: 2 of weights and 2 of gradients for each data-parallel copy, 12 of master and moments, 12 of the copy
that asynchronous saves are written from, and 4 while an update runs: 32 as one process, 36 as TP 2 x DP 2. fp32 would
take 44. On the disk are 64 at most. Everything that is compared takes turns; figures are medians over the rounds after
the first. A load and the conversion begin with files that the kernel has forgotten, and what both load must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from checkpoint_ranks import Rows, drop_cache, load, load_by_deepspeed, saves

from basestone.model.families import layout_of
from basestone.trainer.config import ResolvedRun, RunConfig
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import Layout, parse_layout

VOCAB, SEQUENCE, MB = 8192, 128, 1e6
LAYOUTS = ("dp1-z1", "tp2-dp2-z1")
MEMORY_BYTES_EACH, DISK_BYTES_EACH = 36, 64
TIMEOUT_S = 4 * 3600.0
NOTE = """
ds_to_universal refuses a checkpoint that does not say how tensor-parallel pieces join, and fails on the empty
`_extra_state` of Megatron-core's layers. The saves here carry the smallest description that gives the right tensors
(UNIVERSAL_INFO in bench/checkpoint_ranks.py) and leave `_extra_state` out. Ours needs neither."""


class Figures(NamedTuple):
    """Of one layout: seconds of the slowest rank and bytes of the fullest one, round by round."""

    layout: str
    rows: Rows
    share: int  # bytes of the fullest rank's file
    num_bytes: int


def run_of(layout: Layout, hidden: int, layers: int, ds_config: str | None = None) -> RunConfig:
    """Make the run of one layout."""
    run = RunConfig(
        model={
            "family": "llama",
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // 64,
            "num_query_groups": hidden // 128,
            "max_sequence_length": SEQUENCE,
            "vocab_size": VOCAB,
        },
        data={"train": "nowhere", "tokenizer": "nowhere", "sequence_length": SEQUENCE},
        train={"steps": 1, "global_batch": layout.data, "dtype": "bf16"},
        optimizer={"lr": 1e-4},
    )
    run = layout.of(run)
    return run.model_copy(update={"parallel": run.parallel.model_copy(update={"ds_config": ds_config})})


def resolved_of(name: str, shape: tuple[int, int], ds_config: str | None = None) -> ResolvedRun:
    """Derive what follows for a layout."""
    layout = parse_layout(name)
    return run_of(layout, *shape, ds_config).resolve(layout.processes, VOCAB)


def num_parameters(resolved: ResolvedRun) -> int:
    """Count the model's parameters."""
    return sum(row.numel for row in layout_of(resolved.run.model).values())


def shape_of(parameters: float) -> tuple[int, int]:
    """Give (hidden size, layers) of the Llama that comes nearest to a number of parameters."""
    shapes = [
        (hidden, layers)
        for hidden in range(256, 4097, 256)
        for layers in range(hidden // 128, hidden // 48 + 1)
    ]
    return min(shapes, key=lambda shape: abs(num_parameters(resolved_of("dp1-z1", shape)) - parameters))


def measure_saves(name: str, shape: tuple[int, int], folder: Path, rounds: int) -> Figures:
    """Measure all ways to save in one layout."""
    size = parse_layout(name).processes
    answers = run_ranks(saves, size, resolved_of(name, shape), folder, rounds, timeout_s=TIMEOUT_S)
    rows = {
        key: [max(each) for each in zip(*(rows[key] for rows, _ in answers), strict=True)]
        for key in answers[0][0]
    }
    shutil.rmtree(folder / "asynchronous")
    shares = [share for _, share in answers]
    return Figures(name, rows, max(shares), sum(shares))


def measure_loads(shape: tuple[int, int], folder: Path, rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """Load the checkpoint of four ranks on one: ours, and DeepSpeed's after its conversion, in turns."""
    config = folder / "universal.json"
    zero = {
        "stage": 1,
        "overlap_comm": False,
        "reduce_bucket_size": 50000000,
        "allgather_bucket_size": 50000000,
    }
    config.write_text(json.dumps({"zero_optimization": zero, "checkpoint": {"load_universal": True}}))
    ours, theirs = resolved_of("dp1-z1", shape), resolved_of("dp1-z1", shape, str(config))
    found: dict[str, list[tuple[float, ...]]] = {"ours": [], "deepspeed": [], "conversion": []}
    for _ in range(rounds):
        found["ours"].append(run_ranks(load, 1, ours, folder, timeout_s=TIMEOUT_S)[0])
        found["conversion"].append(convert(folder))
        found["deepspeed"].append(run_ranks(load_by_deepspeed, 1, theirs, folder, timeout_s=TIMEOUT_S)[0])
    return found


def convert(folder: Path) -> tuple[float, float]:
    """Run DeepSpeed's conversion with its defaults; give seconds and the resident bytes of its largest process."""
    shutil.rmtree(folder / "universal", ignore_errors=True)
    drop_cache(folder / "deepspeed")
    program = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal"]
    line = [*program, "--input_folder", folder / "deepspeed/step", "--output_folder", folder / "universal/step"]
    started_s = time.perf_counter()
    with open(folder / "conversion.txt", "w") as output:
        child = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)  # it and its workers write where nothing must be left
            child.wait()
            raise
    if status:
        raise SystemExit(f"the conversion failed:\n{(folder / 'conversion.txt').read_text()[-2000:]}")
    return time.perf_counter() - started_s, usage.ru_maxrss * 1024.0


# ---- the tables ---------------------------------------------------------------------------------------------------


def warm(values: list[float]) -> float:
    """Give the median without the first, where there are more."""
    return statistics.median(values[1:] or values)


def print_saves(figures: Figures) -> None:
    """Print the rows of one layout."""
    rows, name = figures.rows, figures.layout
    theirs, synced = rows["deepspeed"], rows["deepspeed synced"]

    def line(what: str, ours: list[float]) -> None:
        first, later = ours[0], warm(ours)
        print(
            f"| {name} | {what} | {first:.2f} / {later:.2f} | {theirs[0]:.2f} / {warm(theirs):.2f} | "
            f"{synced[0]:.2f} / {warm(synced):.2f} | {later / warm(theirs):.3f} | {later / warm(synced):.3f} |",
            flush=True,
        )

    beside = f"{warm(rows['async steps']):.0f} steps of {warm(rows['step']):.2f} s"
    line("asynchronous: training blocked", rows["async blocked"])
    line(f"asynchronous: {beside} took longer by", rows["async slowdown"])
    line("synchronous", rows["sync"])


def print_rates(figures: Figures) -> None:
    """Print write rates beside the disk's; each counts the bytes that it wrote."""
    rows, size = figures.rows, figures.num_bytes / MB
    raw = size / warm(rows["raw"])
    rates = {
        "synchronous": size / warm(rows["sync"]),
        "asynchronous, beside training": size / warm(rows["async total"]),
        "DeepSpeed, synced": rows["deepspeed bytes"][-1] / MB / warm(rows["deepspeed synced"]),
    }
    for what, rate in rates.items():
        print(f"| {figures.layout} | {what} | {rate:.0f} | {raw:.0f} | {rate / raw:.0%} |")


def print_memory(figures: Figures) -> None:
    """Print what saves need beside what the rank has."""
    share = figures.share / MB
    for what, key in (
        ("synchronous", "sync peak"),
        ("asynchronous, with its copy", "async peak"),
        ("DeepSpeed", "deepspeed peak"),
    ):
        peak = max(figures.rows[key]) / MB
        print(f"| {figures.layout} | save: {what} | {peak:.0f} | {share:.0f} | {peak / share:.2f} |")


def check_room(count: int, place: Path) -> None:
    """Leave before anything begins where memory or disk would not do."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for what, needed, free in (
        ("of memory", MEMORY_BYTES_EACH * count, available),
        (f"on the disk of {place}", DISK_BYTES_EACH * count, shutil.disk_usage(place).free),
    ):
        if needed > free:
            raise SystemExit(
                f"{needed / 1e9:.1f} GB {what} are needed, {free / 1e9:.1f} are free; lower --parameters"
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=500e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to write; removed at the end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go
    shape = shape_of(arguments.parameters)
    count = num_parameters(resolved_of("dp1-z1", shape))
    print(f"{count / MB:.0f} M parameters: hidden {shape[0]}, {shape[1]} layers", flush=True)
    check_room(count, arguments.dir or Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix="basestone-bench-", dir=arguments.dir) as folder:
        figures = []
        for name in LAYOUTS:
            place = Path(folder) / name
            place.mkdir()
            figures.append(measure_saves(name, shape, place, arguments.rounds))
            if name != LAYOUTS[-1]:
                shutil.rmtree(place)
        print_all(figures, measure_loads(shape, Path(folder) / LAYOUTS[-1], arguments.rounds))


def print_all(figures: list[Figures], loads: dict[str, list[tuple[float, ...]]]) -> None:
    """Print every table."""
    print(
        "\n| layout | save (seconds: first / warm) | ours | DeepSpeed | DeepSpeed, synced | ratio | to synced |"
    )
    print("|---|---|---|---|---|---|---|")
    for each in figures:
        print_saves(each)
    print("\n| layout | save | MB/s | write + fsync alone | of it |\n|---|---|---|---|---|")
    for each in figures:
        print_rates(each)
    seconds = {key: statistics.median(row[0] for row in rows) for key, rows in loads.items()}
    both = seconds["conversion"] + seconds["deepspeed"]
    print(f"\n| {LAYOUTS[-1]} to one process | seconds | ours / theirs |\n|---|---|---|")
    print(f"| ours | {seconds['ours']:.2f} | |")
    print(f"| DeepSpeed: ds_to_universal | {seconds['conversion']:.2f} | |")
    print(
        f"| DeepSpeed: load_universal | {seconds['deepspeed']:.2f} | {seconds['ours'] / seconds['deepspeed']:.3f} |"
    )
    print(f"| DeepSpeed: both | {both:.2f} | {seconds['ours'] / both:.3f} |")
    sums = {loads[key][0][2] for key in ("ours", "deepspeed")}
    if len(sums) > 1:
        raise SystemExit(f"what was loaded is not the same: {sums}")
    print(NOTE)
    print("\n| layout | memory, MB at most over what was there | MB | share | of it |\n|---|---|---|---|---|")
    for each in figures:
        print_memory(each)
    share = figures[-1].num_bytes / MB
    for what, key, place in (
        ("load: ours", "ours", 1),
        ("load: DeepSpeed", "deepspeed", 1),
        ("ds_to_universal, its largest process", "conversion", 1),
    ):
        peak = max(row[place] for row in loads[key]) / MB
        print(f"| {LAYOUTS[-1]} to one | {what} | {peak:.0f} | {share:.0f} | {peak / share:.2f} |")


if __name__ == "__main__":
    main()
