"""Slurm: the batch script, and the commands of a job. Imports no torch.

The script is a dozen lines; what a job does stands in supervise.py. Every value in it is held to what it can be by
cluster.toml's own rules, and paths are quoted.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from ...trainer.errors import ConfigError
from .config import ClusterConfig, SlurmSection
from .job import Job

FIRST_PORT, NUM_PORTS = 20000, 20000  # below what Linux gives to outgoing connections


def options_of(section: SlurmSection) -> dict[str, object]:
    """Give what a job needs to know of the section while it runs."""
    return {
        "array": section.array,
        "max_requeues": section.max_requeues,
        "container": section.container,
        "container_image": section.container_image,
        "container_mounts": list(section.container_mounts),
    }


def script(job: Job, cluster: ClusterConfig, python: str) -> str:
    """Render the batch script."""
    section = cluster.slurm
    if section.container_image and (odd := [place for place in _own_places(job) if set(place) & set(",:")]):
        raise ConfigError(
            f"{odd[0]}: a container would see another path, as {section.container} reads , and : as ends of paths; "
            "move it, or give it by a link without them"
        )
    gpus = section.gpus_per_node
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.min_nodes}" + (f"-{job.max_nodes}" if job.max_nodes != job.min_nodes else ""),
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *([f"--cpus-per-task={section.cpus_per_task}"] if section.cpus_per_task else []),
        *(["--exclusive"] if section.exclusive else []),
        *(
            f"--{name}={value}"
            for name in ("partition", "account", "qos", "reservation", "exclude", "time")
            if (value := getattr(section, name)) is not None
        ),
        *([f"--constraint={section.constraint}"] if section.constraint else []),
        "--output=slurm-%j.log",  # beside the script: a path may hold what sbatch reads as something else
        "--open-mode=append",
        *([f"--array=1-{section.array}%1"] if section.array else ["--requeue"]),
        f"--signal=B:USR2@{section.signal_s}",
        *section.options,
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {_directive(text)}" for text in directives)]
    lines += [f"module load {name}" for name in section.modules]
    lines += [f"exec {shlex.quote(python)} -m basestone.launch.cluster.supervise {job.token}"]
    return "\n".join(lines) + "\n"


def _own_places(job: Job) -> list[str]:
    """Give the folders that a container must see."""
    return list(dict.fromkeys((job.run_dir, str(Path(job.run_file).parent))))


def _directive(text: str) -> str:
    """Quote a directive: sbatch reads it up to a blank or `#`, and knows double quotes."""
    if not any(letter in text for letter in " #\"'\\"):
        return text
    name, _, value = text.partition("=")
    if '"' in value:
        raise ConfigError(
            f"slurm: {name}: sbatch cannot read a value with a double quote in it (got {value!r})"
        )
    return f'{name}="{value}"'


def submit_command(script_name: str) -> list[str]:
    """Give the command line that puts a job into the queue and prints its number; it works in the script's folder."""
    return ["sbatch", "--parsable", script_name]


def endpoint(given: dict[str, str]) -> str:
    """Give where the nodes of a job meet: its first node, and a port that other jobs there do not have.

    Raises:
        ConfigError: this is no Slurm job.
    """
    if "SLURM_JOB_ID" not in given or "SLURM_JOB_NODELIST" not in given:
        raise ConfigError("this is no Slurm job: SLURM_JOB_ID and SLURM_JOB_NODELIST are not set")
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", given["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0 or not listed.stdout.split():
        raise ConfigError(f"scontrol cannot list {given['SLURM_JOB_NODELIST']}: {listed.stderr.strip()}")
    return f"{listed.stdout.split()[0]}:{FIRST_PORT + int(given['SLURM_JOB_ID']) % NUM_PORTS}"


def step_command(job: Job, given: dict[str, str]) -> list[str]:
    """Give the command line that starts one node entry on every node of a job."""
    nodes = given.get("SLURM_JOB_NUM_NODES", str(job.max_nodes))
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    command += ["--kill-on-bad-exit=1", "--wait=60", "--export=ALL"]
    if "SLURM_CPUS_PER_TASK" in given:  # srun no longer takes it from sbatch by itself
        command.append(f"--cpus-per-task={given['SLURM_CPUS_PER_TASK']}")
    image, mounts = job.options.get("container_image"), job.options.get("container_mounts") or []
    own = _own_places(job)
    if image and job.options["container"] == "pyxis":
        command += [
            f"--container-image={image}",
            f"--container-mounts={','.join([*(f'{place}:{place}' for place in own), *mounts])}",
        ]
    elif image:
        binds = [option for mount in (*own, *mounts) for option in ("--bind", mount)]
        command += ["apptainer", "exec", "--nv", *binds, image]
    return [
        *command,
        "python3" if image else job.options["python"],
        "-m",
        "basestone.launch.cluster.node",
        job.token,
    ]


def is_last_of_array(given: dict[str, str]) -> bool:
    """Tell whether no job of an array comes after this one."""
    return given.get("SLURM_ARRAY_TASK_ID") == given.get("SLURM_ARRAY_TASK_MAX")


def requeue_command(given: dict[str, str]) -> list[str]:
    """Give the command line that puts the present job back into the queue."""
    return ["scontrol", "requeue", given["SLURM_JOB_ID"]]
