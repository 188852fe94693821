"""A whole run whose ranks are killed at random moments, again and again, until it gets through."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import whole_run
from commands import steps_of
from faults import before, kill_self
from legal_layouts import laid_out
from small_corpus import make_corpus

from basestone.data.storage import write_atomic
from basestone.trainer import engine
from basestone.trainer.checkpoint.format import steps_in
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.errors import CheckpointError
from basestone.trainer.forks import RankDied
from basestone.trainer.load import load_run

VOCAB = 512
KEPT = (
    ("checkpoint.keep_last=1",),
    ("checkpoint.keep_last=2", "checkpoint.every_steps=1"),
    ("checkpoint.keep_last=1", "checkpoint.rollback_steps=3"),
    ("checkpoint.keep_last=3",),
)
Layout = tuple[int, tuple[str, ...]]  # processes, and what they take in place of the run file's
SERIAL: Layout = (1, ("parallel.tensor=1", "parallel.zero=0"))
Record = dict[str, Any]


def one_run(folder: Path, chance: random.Random) -> Record:
    """Train one run through random kills, in one layout or in another after each; give a record with its problems."""
    layouts = _layouts(_corpus(folder))
    reshaped, layout, kept = chance.random() < 0.5, chance.choice(layouts), chance.choice(KEPT)
    expected = _reference(folder, SERIAL if reshaped else layout)
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)  # of a campaign that was killed
    record: Record = {"reshaped": reshaped, "keys": kept, "attempts": [], "kills": 0, "problems": []}
    record |= {"in_flight": 0, "in_prune": 0}
    through, most = False, chance.randint(2, 6)
    while not through and not record["problems"]:
        saves = f"checkpoint.asynchronous={chance.choice(('true', 'false'))}"
        fault = _fault(chance, layout[0]) if record["kills"] < most else None
        record["attempts"].append([layout[0], *layout[1], saves])
        through = _attempt(folder, run_dir, layout, (*kept, saves), fault, record)
        layout = chance.choice(layouts) if reshaped else layout
    if through:
        record["problems"] = _differences(_curve(run_dir), expected, 1e-5 if reshaped else 0.0)
    if not record["problems"]:
        shutil.rmtree(run_dir)
    return record


def _fault(chance: random.Random, size: int) -> whole_run.Fault:
    """Kill one rank or all of them: some time after the start, or after the beginning of a step."""
    ranks = chance.choice([(chance.randrange(size),), tuple(range(size))])
    step = chance.randint(0, 3)
    delays_s = [chance.uniform(0.1, 1.0) if step == 0 else chance.uniform(0.0, 0.2)] * size
    delays_s = [seconds + chance.uniform(0.0, 0.01) for seconds in delays_s]

    def prepare(rank: int) -> None:
        if rank not in ranks:
            return
        timer = threading.Timer(delays_s[rank], kill_self)
        timer.daemon = True
        if step == 0:
            timer.start()
        else:
            before(engine.Engine, "forward_backward", timer.start, step)

    return prepare


def _train(folder: Path, run_dir: Path, layout: Layout, keys: tuple[str, ...] = (), fault: Any = None) -> None:
    """Train, and put what the ranks print into a file."""
    size, changes = layout

    def prepare(rank: int) -> None:
        with open(folder / "output.txt", "ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        if fault is not None:
            fault(rank)

    whole_run.train(folder / "corpus", run_dir, *changes, *keys, size=size, fault=prepare)


def _attempt(
    folder: Path, run_dir: Path, layout: Layout, keys: tuple[str, ...], fault: Any, record: Record
) -> bool:
    """Train until the end or the kill, and look at what is left; tell whether it was the end."""
    through = False
    try:
        _train(folder, run_dir, layout, keys, fault)
        through = True
    except RankDied as error:
        if fault is None or "exit code -9" not in str(error):
            record["problems"].append(f"{layout}: {error}")
        record["kills"] += 1
    except Exception as error:
        record["problems"].append(f"{layout}: {type(error).__name__}: {error}")
    names = [path.name for path in run_dir.glob("checkpoints/*")]
    record["in_flight"] += any(name.startswith(".tmp-") for name in names)
    record["in_prune"] += any(name.startswith(".trash-") for name in names)
    for _, path in steps_in(run_dir / "checkpoints"):
        try:
            record["problems"] += Reader(path).verify()
        except CheckpointError as error:
            record["problems"].append(str(error))
    return through


def _curve(run_dir: Path) -> list[list[float]]:
    """Give loss and gradient norm of every step."""
    return [[record["loss"], record["grad_norm"]] for _, record in sorted(steps_of(run_dir).items())]


def _differences(curve: list[list[float]], expected: list[list[float]], tolerance: float) -> list[str]:
    if len(curve) != len(expected):
        return [f"{len(curve)} steps, not {len(expected)}"]
    return [
        f"step {step}: loss and norm {found}, and {known} in a run that nothing happened to"
        for step, (found, known) in enumerate(zip(curve, expected, strict=True), start=1)
        if any(not abs(a - b) <= tolerance * abs(b) for a, b in zip(found, known, strict=True))
    ]


# ---- what it is compared with ---------------------------------------------------------------------------------


def _corpus(folder: Path) -> Path:
    """Make the corpus once; it has its name when it is whole."""
    corpus, temporary = folder / "corpus", folder / "corpus.tmp"
    if not corpus.exists():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        make_corpus(temporary).rename(corpus)
    return corpus


def _layouts(corpus: Path) -> list[Layout]:
    run = load_run(corpus / "run.toml")
    keys = ("tensor", "sequence", "pipeline", "virtual_pipeline", "zero", "offload")
    return [
        (size, tuple(f"parallel.{key}={_toml(getattr(laid.parallel, key))}" for key in keys))
        for size, laid in laid_out(run, VOCAB)
    ]


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reference(folder: Path, layout: Layout) -> list[list[float]]:
    """Give the curve of a run that nothing happens to; each layout's is made once."""
    file, name = folder / "references.json", json.dumps(layout)
    known = json.loads(file.read_text()) if file.exists() else {}
    if name not in known:
        run_dir = folder / "reference"
        shutil.rmtree(run_dir, ignore_errors=True)
        _train(folder, run_dir, layout)
        known[name] = _curve(run_dir)
        shutil.rmtree(run_dir)
        write_atomic(file, json.dumps(known).encode())
    return known[name]
