"""Run a function as several gloo ranks: forked after the imports, so a layout costs no new start of torch.

The parent must never make a process group itself.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basestone.trainer.engine  # noqa: F401  (imported once, before any fork)

TIMEOUT_S = 240


def _child(function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, args: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), BASESTONE_RENDEZVOUS=store)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException as error:  # a failing rank must answer, or the parent waits
        pipe.send((False, (error, traceback.format_exc())))
    pipe.close()
    os._exit(0)  # no atexit: groups may be half gone


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Give what `function(*args)` returned on each of `size` ranks; raise the first rank's error."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, children = [], []
        for rank in range(size):
            parent, child = context.Pipe()
            process = context.Process(target=_child, args=(function, rank, size, store, child, args))
            process.start()
            child.close()
            pipes.append(parent)
            children.append(process)
        answers = []
        try:
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(TIMEOUT_S):
                    raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S} s")
                answers.append(pipe.recv())
        finally:
            for process in children:
                process.join(timeout=10)
                process.kill()
    for good, value in answers:
        if not good:
            error, text = value
            error.add_note(text)
            raise error
    return [value for _, value in answers]
