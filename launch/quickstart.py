"""`basestone quickstart`: the whole way on this machine, each step by the command that a user would type.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data.builtin import prepare_builtin
from ..trainer.errors import ConfigError
from ..trainer.load import load_run
from ..trainer.report.records import RunRecords, number, read_records
from .environ import cache_dir, child_environment, num_gpus
from .gpus import quickstart_keys

PROMPT = "The following functions are"
# What a user of transformers types; nothing of Basestone is imported.
SAMPLE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def run_quickstart(out: Path, fresh: bool) -> int:
    """Prepare, train, kill halfway, resume, export, sample, report; give the exit code."""
    if find_spec("transformers") is None:
        raise ConfigError("quickstart exports to Hugging Face: pip install 'basestone[hf]'")
    console = Console(highlight=False)
    recipe = Path(str(resources.files("basestone.recipes").joinpath("quickstart.toml")))
    run, hf = out / "run", out / "hf"
    if fresh and out.exists():
        if not (run / "metrics.jsonl").exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: holds something that is no quickstart; choose another --out")
        shutil.rmtree(out)
    started_s = time.monotonic()

    _heading(console, 1, "an embedded corpus: Python's documentation topics and library sources")
    corpus = prepare_builtin(
        "builtin:python", cache_dir(), lambda text: console.print(f"  {text}", markup=False)
    )
    text_mb = (corpus.report["train_bytes"] + corpus.report["heldout_bytes"]) / 1e6
    console.print(
        f"  {corpus.report['documents_kept']} documents, {text_mb:.1f} MB, deduplicated; "
        f"{corpus.report['heldout_documents']} held out; shards and tokenizer in {corpus.train.parent}",
        soft_wrap=True,
    )
    keys = [word for key in quickstart_keys(load_run(recipe)) for word in ("--set", key)]
    train = ["train", str(recipe), "--run-dir", str(run), *keys]
    config = load_run(recipe, keys[1::2])
    halfway = (config.train.steps or 0) // 2

    backend, many = ("nccl" if num_gpus() else "gloo"), "es" if config.run.processes != 1 else ""
    _heading(
        console,
        2,
        f"training on {config.run.processes} process{many} ({backend}), to be killed with SIGKILL after step {halfway}",
    )
    if not (run / "COMPLETE").exists():
        _train_and_kill(train, run, halfway, console)
    _heading(console, 3, "the same command again: it goes on from the newest good checkpoint")
    _run(train)
    _heading(console, 4, "export to Hugging Face, compared with the trainer's logits")
    shutil.rmtree(hf, ignore_errors=True)
    _run(["export", str(run), str(hf)])
    _heading(console, 5, "a sentence from transformers, which knows nothing of Basestone")
    environment = {**child_environment(), "HF_HUB_OFFLINE": "1"}
    sample = [sys.executable, "-W", "ignore", "-c", SAMPLE, str(hf), PROMPT]
    text = subprocess.run(sample, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    console.print(f"  {text!r}", markup=False)
    _run(["report", str(run)], quiet=True)
    console.print()
    console.print(_summary(read_records(run), out, time.monotonic() - started_s))
    console.print(_next_steps(out, [str(recipe), *keys]), markup=False, soft_wrap=True)
    return 0


def _heading(console: Console, number_: int, text: str) -> None:
    console.print(f"\n[bold]{number_}. {text}[/bold]")


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "basestone.launch", *arguments]


def _run(arguments: list[str], quiet: bool = False) -> None:
    output = subprocess.DEVNULL if quiet else None
    code = subprocess.run(_command(arguments), env=child_environment(), stdout=output).returncode
    if code:
        raise SystemExit(code)


def _train_and_kill(train: list[str], run: Path, halfway: int, console: Console) -> None:
    """Start training in a process group of its own and kill it once it is halfway and has saved."""
    process = subprocess.Popen(_command(train), env=child_environment(), process_group=0)
    try:
        while process.poll() is None:
            time.sleep(0.1)
            steps = read_records(run).steps if (run / "latest").exists() else []
            if steps and steps[-1]["step"] > halfway:
                # Only the parent is killed: that its workers die with it is part of what is shown.
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                console.print(f"  [bold red]killed with SIGKILL after step {steps[-1]['step']}[/bold red]")
                return
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if process.returncode:
        raise SystemExit(process.returncode)


def _summary(records: RunRecords, out: Path, elapsed_s: float) -> Table:
    first, last = records.steps[0], records.steps[-1]
    name, evals = next(iter(records.evals.items()))
    rates = sorted(value for _, value in records.curve("tokens_per_s"))
    mfu, ledger = number(last, "mfu"), records.ledger
    joules = number(ledger, "joules")
    table = Table(title=f"done in {elapsed_s / 60:.1f} minutes", title_justify="left", show_header=False)
    rows: list[tuple[str, Any]] = [
        ("training loss", f"{first['loss']:.3f} -> {last['loss']:.3f} over {last['step']} steps"),
        (f"held-out perplexity ({name})", f"{evals[0]['perplexity']:.1f} -> {evals[-1]['perplexity']:.1f}"),
        ("held-out bits per byte", f"{evals[0]['bits_per_byte']:.3f} -> {evals[-1]['bits_per_byte']:.3f}"),
        ("tokens/s (median)", f"{rates[len(rates) // 2]:,.0f}"),
        ("MFU", "n/a (no peak is known for this CPU)" if mfu is None else f"{100 * mfu:.1f} %"),
        (
            "energy",
            "n/a (no counter here; set meter.watts to estimate)"
            if joules is None
            else f"{joules:,.0f} J ({ledger['joules_source']})",
        ),
        (
            "lost to the kill",
            f"{ledger['wasted_tokens']:,} tokens, {ledger['wasted_s']:.0f} s of {ledger['train_s']:.0f} s",
        ),
        ("model for transformers", str(out / "hf")),
        ("report", str(out / "run" / "report.html")),
        ("run directory", str(out / "run")),
    ]
    for label, text in rows:
        table.add_row(label, text)
    return table


def _next_steps(out: Path, recipe: list[str]) -> str:
    return (
        "what to type next:\n"
        f'  basestone generate {out / "run"} --prompt "def main("\n'
        f"  basestone train {' '.join(recipe)} --run-dir runs/longer --set train.steps=500\n"
        "  basestone prepare YOUR_TEXT/ --out shards/yours\n"
        "  basestone --help"
    )
