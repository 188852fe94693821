"""`basestone finetune`: options in, workers started. Imports no torch."""

from __future__ import annotations

import enum
import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from . import environ, local

MAX_SEED = (1 << 32) - 1  # what numpy's generators take, which transformers seeds, too


class Task(enum.StrEnum):
    """What is learnt."""

    sft = "sft"
    classify = "classify"


class TrainingDtype(enum.StrEnum):
    """What is computed in; the weights stay in fp32 beside it."""

    fp32 = "fp32"
    bf16 = "bf16"


def finetune(
    source: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="An exported directory, or another model's.", show_default=False),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            help='JSON lines: {"prompt", "answer"}, {"messages"} or {"text"}; to classify {"text", "label"}.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The directory to write; must not exist.", show_default=False)
    ],
    task: Annotated[Task, typer.Option(help="Answers to prompts, or classes of texts.")] = Task.sft,
    heldout: Annotated[
        Path | None,
        typer.Option("--eval", help="Held-out examples; to classify, by default a tenth of DATA."),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Tune adapters of this rank, and merge them.", min=1)
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Write the adapter alone, for PEFT.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="How often each example is seen.", min=1)] = 3,
    steps: Annotated[int | None, typer.Option(help="So many steps, in place of epochs.", min=1)] = None,
    lr: Annotated[
        float | None, typer.Option(help="By default 2e-5, for adapters 2e-4.", min=1e-12, max=10.0)
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples of a step, over all processes.", min=1)] = 16,
    micro_batch: Annotated[
        int | None, typer.Option(help="Examples of one forward pass; by default up to 8.", min=1)
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps in which the rate rises.", min=0.0, max=1.0)
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", min=0.0, max=1.0)] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", min=1e-6)] = 1.0,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens; by default the model's.", min=2)
    ] = None,
    dtype: Annotated[
        TrainingDtype | None, typer.Option(help="By default bf16 on a GPU, fp32 without one.")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--processes", help="Local ranks; by default one per GPU, else 1.", min=1)
    ] = None,
    zero: Annotated[int, typer.Option(help="DeepSpeed's ZeRO stage; 0 without it.", min=0, max=3)] = 0,
    seed: Annotated[int, typer.Option(help="Of the order and the adapters.", min=0, max=MAX_SEED)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print for machines.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Fine-tune a Hugging Face directory on prompts and answers, or to classify texts.

    Loss counts on the answers alone. OUT is a plain directory like DIR, with metrics.json and a model card, and
    appears when it is whole.
    """
    from .gpus import check_ranks

    settings = {
        "source": str(source),
        "data": str(data),
        "out": str(out),
        "heldout": None if heldout is None else str(heldout),
        "task": task.value,
        "lora": lora,
        "keep_adapter": keep_adapter,
        "zero": zero,
        "epochs": epochs,
        "steps": steps,
        "lr": lr,
        "batch": batch,
        "micro_batch": micro_batch,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "max_length": max_length,
        "dtype": None if dtype is None else dtype.value,
        "seed": seed,
    }
    arguments = ["finetune", json.dumps(settings)]
    arguments += ["--json"] if as_json else []
    arguments += ["--debug"] if debug else []
    num_workers = num_processes or max(1, environ.num_gpus())
    check_ranks(num_workers)
    with tempfile.TemporaryDirectory(prefix="basestone-logs-") as logs:  # of ranks that have no terminal
        raise typer.Exit(local.run_workers(arguments, num_workers, Path(logs)))
