"""What a launch would run: `--dry-run` prints it, and a start runs just that. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...trainer.errors import ConfigError
from .. import environ
from . import hosts as by_ssh
from . import kubernetes, mpi, node, slurm
from .config import ClusterConfig
from .hostfile import Host
from .job import Job


@dataclass(frozen=True)
class Plan:
    """The files that are written into the launch's folder, and the command lines that are run here."""

    files: dict[Path, str]
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)  # beside this one
    directory: Path | None = None  # to run them in; by default this one

    def shown(self, job: Job) -> str:
        """Give all of it as text; secrets by their names alone."""
        parts = [f"# {job.path}\n{job.as_json()}"]
        parts += [f"# {path}\n{content}" for path, content in self.files.items()]
        if job.secrets:
            parts.append(f"# secrets by their names: {', '.join(job.secrets)}\n")
        prefix = f"cd {shlex.quote(str(self.directory))} && " if self.directory is not None else ""
        prefix += "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        parts += [f"{prefix}{shlex.join(command)}\n" for command in self.commands]
        return "\n".join(parts)


def make_plan(job: Job, cluster: ClusterConfig, hosts: Sequence[Host], folder: Path, run_text: str) -> Plan:
    """Plan a launch whose files go to `folder`; `run_text` is the run file, whole.

    Raises:
        ConfigError: a value cannot be written the way that the backend wants.
    """
    if job.backend in ("local", "torchrun"):
        return Plan({}, [node.agent_command(job, job.endpoint or f"HOST:{node.PORT}")])
    if job.backend == "slurm":
        path = folder / "job.sbatch"
        script = slurm.script(job, cluster, job.options["python"])
        return Plan({path: script}, [slurm.submit_command(path.name)], directory=folder)
    if job.backend == "kubernetes":
        path = folder / "manifests.json"
        command = ["kubectl", "apply", "-f", str(path)]
        return Plan({path: kubernetes.text(kubernetes.manifests(job, cluster, run_text))}, [command])
    if not hosts:
        raise ConfigError(f"--on {job.backend} needs --hostfile FILE: one host a line, `worker-1 slots=8`")
    if job.backend == "mpi":
        meeting = {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": str(port_of(job))}
        sent_on = [*meeting, *environ.clean_environment(("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"))]
        return Plan({}, [mpi.mpirun_command(job, hosts, sent_on, as_root=os.geteuid() == 0)], meeting)
    listed = "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
    # DeepSpeed changes to this directory on every host, by a shell.
    command = by_ssh.runner_command(job, hosts, port_of(job))
    return Plan({folder / "hostfile": listed}, [command], directory=Path("/"))


def port_of(job: Job) -> int:
    """Give the port at which the ranks of a launch meet; another launch has another one, as a rule."""
    return slurm.FIRST_PORT + int.from_bytes(hashlib.sha256(job.name.encode()).digest()[:4]) % slurm.NUM_PORTS
