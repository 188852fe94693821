"""Hosts by ssh: DeepSpeed's own launcher over pdsh. Imports no torch.

DeepSpeed puts the words of its command line, its working directory and a part of its environment into a shell on every
host, without quotes. So it gets words that no shell reads as anything else, `/` to work in, and few variables.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...trainer.errors import ConfigError
from .. import environ
from .hostfile import Host
from .job import Job

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PLAIN = re.compile(r"[A-Za-z0-9_./=+:,@-]*")
KEPT = ("PATH", "HOME", "USER", "LANG", "TERM", "SSH_AUTH_SOCK", "TMPDIR", "LD_LIBRARY_PATH")
SENT_ON = ("PYTHON", "UCX", "MV2", "MLFLOW", "NCCL")  # the prefixes of what DeepSpeed sends to the hosts
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *(
        "-o",
        "ServerAliveInterval=10",
        "-o",
        "ServerAliveCountMax=3",
    ),  # a dead host is missed within half a minute
)
MAX_AT_ONCE = 64


def runner_command(job: Job, hosts: Sequence[Host], port: int) -> list[str]:
    """Give the command line of DeepSpeed's launcher; its hostfile must hold these hosts."""
    return [
        job.options["python"],
        *("-m", "deepspeed.launcher.runner"),
        f"--hostfile={job.folder / 'hostfile'}",
        "--launcher=pdsh",
        f"--master_addr={hosts[0].name}",
        f"--master_port={port}",
        "--no_local_rank",
        *("--module", "basestone.launch.cluster.rank", job.token),
    ]


def runner_environment() -> tuple[dict[str, str], list[str]]:
    """Give what DeepSpeed's launcher may know, and the names of what it would send on in an unsafe way: left out."""
    environment = environ.clean_environment(KEPT, SENT_ON)
    odd = [
        name
        for name, value in environment.items()
        if name.startswith(SENT_ON) and not (NAME.fullmatch(name) and PLAIN.fullmatch(value))
    ]
    kept = {name: value for name, value in environment.items() if name not in odd}
    return kept | {
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS_APPEND": " ".join(SSH_OPTIONS),
        "DS_ENV_FILE": "basestone-has-none",
    }, odd


def check_tools(python: str) -> None:
    """See that there is what DeepSpeed's launcher needs.

    Raises:
        ConfigError: a program is missing, or Python's path is none that it can pass on.
    """
    if missing := [name for name in ("ssh", "pdsh") if shutil.which(name) is None]:
        raise ConfigError(f"--on hosts needs {' and '.join(missing)} here, and pdsh's ssh module; install them")
    if not PLAIN.fullmatch(python):
        raise ConfigError(
            f"python {python!r}: DeepSpeed's launcher passes it through a shell on every host; install into a path of "
            "letters, digits and ./_-"
        )


def reachable(hosts: Sequence[Host]) -> tuple[list[Host], dict[str, str]]:
    """Ask every host at once; give those that answer, and why the others do not."""
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        answers = list(pool.map(lambda host: on_host(host, ["true"]), hosts))
    problems = {
        host.name: (said.strip().splitlines() or [f"ssh left with {code}"])[-1]
        for host, (code, said) in zip(hosts, answers, strict=True)
        if code != 0
    }
    return [host for host in hosts if host.name not in problems], problems


def present_hosts(hosts: Sequence[Host], low: int, high: int) -> list[Host]:
    """Give the hosts that a start can have, from `low` to `high` of them.

    Raises:
        ConfigError: fewer answer than the launch needs; it names each that does not.
    """
    found, problems = reachable(hosts)
    if len(found) < low:
        told = "\n".join(f"  {name}: {reason}" for name, reason in problems.items())
        raise ConfigError(
            f"{len(problems)} of {len(hosts)} host(s) cannot be reached by ssh, {low} are needed:\n{told}\n"
            "keys without a passphrase (or an agent) and known_hosts must be set up; try ssh by hand"
        )
    return found[:high]


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write the hosts of a start for DeepSpeed's launcher."""
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def reap_everywhere(job: Job, hosts: Sequence[Host]) -> None:
    """End on every host what a start left there: its launcher stops the ranks of its own host alone."""
    command = [job.options["python"], "-m", "basestone.launch.cluster.reap", job.token]
    path = environ.clean_environment(("PYTHONPATH",)).get("PYTHONPATH", "")
    if path and PLAIN.fullmatch(path):
        command = ["env", f"PYTHONPATH={path}", *command]
    with ThreadPoolExecutor(MAX_AT_ONCE) as pool:
        list(pool.map(lambda host: on_host(host, command), hosts))


def on_host(host: Host, command: Sequence[str]) -> tuple[int, str]:
    """Run a command of plain words on a host; give its exit code and what it said."""
    assert all(PLAIN.fullmatch(word) for word in command)
    try:
        done = subprocess.run(
            ["ssh", *SSH_OPTIONS, "--", host.name, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, "no answer within 60 s"
    return done.returncode, done.stderr + done.stdout
