"""The command line and the workers that it starts as forks of this process, which has imported everything once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from commands import environment

from basestone.launch import cli, local
from basestone.trainer import engine, worker  # noqa: F401  (the engine is what takes seconds to import)

CONTEXT = multiprocessing.get_context("fork")
TIMEOUT_S = 300.0


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    words = list(map(str, arguments))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = CONTEXT.Process(target=_launch, args=(words, cwd, out, err))
        process.start()
        process.join(TIMEOUT_S)
        process.kill()
        process.join()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, process.exitcode, out.read().decode(), err.read().decode())


def _launch(words: list[str], cwd: Path | None, out: IO[bytes], err: IO[bytes]) -> None:
    _become(environment(), out.fileno(), err.fileno())
    os.chdir(cwd or ".")
    local.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=Worker, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL
    )
    sys.argv = ["basestone", *words]
    _leave(cli.main)


class Worker:
    """A worker that is forked where `subprocess.Popen` would start one anew."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: IO[bytes] | None,
        stderr: int | None,
        preexec_fn: Callable[[], None],
        process_group: int,
    ) -> None:
        """Fork it; the arguments are those of the launcher."""
        assert (command[1:3], stdin) == (["-m", "basestone.trainer.worker"], subprocess.DEVNULL)
        output = 1 if stdout is None else stdout.fileno()
        errors = output if stderr == subprocess.STDOUT else 2

        def work() -> None:
            os.setpgid(0, process_group)
            preexec_fn()
            _become(env, output, errors)
            torch.set_num_threads(1)
            _leave(lambda: worker.main(list(command[3:])))

        self._process = CONTEXT.Process(target=work)
        self._process.start()
        self.pid, self.kill, self.wait = self._process.pid, self._process.kill, self._process.join

    @property
    def returncode(self) -> int | None:
        """Its exit code once it has ended."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid or 0, number)


def _become(variables: Mapping[str, str], output: int, errors: int) -> None:
    """Be as a process is at its start: default signals, an environment, streams, and nothing of pytest's."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(errors, 2)
    os.dup2(output, 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    warnings.resetwarnings()
    warnings.filterwarnings("ignore")


def _leave(work: Callable[[], Any]) -> None:
    """Do it and leave with its exit code, by no handler of the process that was forked."""
    code = 0
    try:
        work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
