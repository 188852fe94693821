"""One rank of a launch: `python -m basestone.launch.cluster.rank TOKEN`, started by whatever the launcher is.

It finds out which rank it is, starts the worker as its child, writes what that says to RUN/logs/rank_00003.log (rank 0
shows it, too), and leaves how it ended for those who look for the cause. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from ...trainer.errors import BasestoneError, exit_code_of, message_of
from ...trainer.run_lock import is_held
from .. import environ, local
from . import ends, reap
from .job import Job, decode, read_job

WATCH_S = 5.0  # between two looks for the launch
DRAIN_S = 5.0  # that the worker's last words may take after its end


def main() -> None:
    """Be a rank; leave with 0 where a new start would change nothing."""
    local.die_with_parent(os.getppid())  # an agent that is killed would leave ranks that go on without it
    try:
        # The deepspeed launcher adds --local_rank=N; the environment says the same.
        job = read_job(decode(next(word for word in sys.argv[1:] if not word.startswith("--"))))
        identity = environ.rank_of_launcher(job.backend)
    except BasestoneError as error:
        print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        sys.exit(exit_code_of(error))
    sys.exit(run_rank(job, identity))


def run_rank(job: Job, identity: environ.RankIdentity) -> int:
    """Run the worker to its end and give the code to leave with."""
    log = job.logs / f"rank_{identity.rank:05d}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    ends.clear_own(job.folder, identity.rank, identity.world_size)
    given = {**job.environment, **job.read_secrets()}
    with log.open("ab") as output:
        worker = subprocess.Popen(
            local.worker_command(worker_arguments(job)),
            env=environ.rank_environment(identity, given, job.interface),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(local.die_with_parent, os.getpid()),
            process_group=0,  # signals reach this process alone, which passes them on once
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _ask(worker))
        with reap.recorded(job.folder, identity.rank, worker.pid):
            assert worker.stdout is not None
            shown = sys.stdout.fileno() if identity.rank == 0 else None
            pump = threading.Thread(
                target=_pump, args=(worker.stdout.fileno(), output.fileno(), shown), daemon=True
            )
            pump.start()
            if job.backend == "hosts" and identity.rank == 0:
                threading.Thread(target=_watch, args=(job, worker), daemon=True).start()
            code = worker.wait()
            pump.join(DRAIN_S)
    told = code == 0
    if code != 0:
        with contextlib.suppress(OSError):  # a full disk: the code itself must say it
            ends.leave(job.folder, identity.rank, socket.gethostname(), code, log)
            told = True
    # A launcher that restarts ranks by itself knows one kind of failure; the file says what this was.
    return 0 if told and code in local.FINAL_EXITS else max(code, 1)


def worker_arguments(job: Job) -> list[str]:
    """Give the worker's command line."""
    arguments = ["preflight" if job.check else "train", job.run_file, "--run-dir", job.run_dir]
    arguments += ["--preflight", json.dumps(job.preflight)]
    for override in job.overrides:
        arguments += ["--set", override]
    arguments += ["--resume", job.resume] if job.resume else []
    arguments += ["--debug"] if job.debug else []
    return arguments


def _watch(job: Job, worker: subprocess.Popen[bytes]) -> None:
    """Let the run save and stop when its launch was killed: what ssh has started does not end with it."""
    if not is_held(job.folder):  # locks do not reach this host
        return
    while worker.poll() is None:
        time.sleep(WATCH_S)
        if not is_held(job.folder):
            print("the launch is gone: the run is asked to save and stop", file=sys.stderr, flush=True)
            _ask(worker)
            return


def _ask(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        worker.send_signal(signal.SIGTERM)


def _pump(source: int, log: int, shown: int | None) -> None:
    """Copy what the worker says, until nobody can say anything more."""
    while data := os.read(source, 65536):
        for target in (log, shown):
            rest = data
            while rest and target is not None:
                try:
                    rest = rest[os.write(target, rest) :]
                except OSError:  # a full disk, or a closed terminal: the worker must not stop for it
                    break


if __name__ == "__main__":
    main()
