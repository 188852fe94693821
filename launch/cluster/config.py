"""What a cluster is like: `cluster.toml`, one file for all runs there. Imports no torch.

Values that reach a batch script or a manifest are held to what such a value can be, so that none of them is read as
anything else there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from ...trainer.load import read_toml, validated
from ...trainer.preflight.limits import PreflightSection
from ...trainer.sections import Section

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@/+=\[\]-]*$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]  # of an environment variable
Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]  # of Kubernetes
Value = Annotated[str, StringConstraints(pattern=r"^[^\n\r\x00]*$")]
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\n\r\x00]+$")]

OWN_OPTIONS = (
    *(
        "output",
        "error",
        "nodes",
        "ntasks",
        "signal",
        "array",
        "requeue",
        "no-requeue",
        "export",
        "wrap",
        "test-only",
    ),
    *("job-name", "parsable", "wait", "open-mode"),
)
OWN_VARIABLES = re.compile(
    "(MASTER_(ADDR|PORT)|(GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_(RANK|WORLD_SIZE|SIZE)|(PET|TORCHELASTIC|BASESTONE)_.*"
    "|TORCH_DISABLE_SHARE_RDZV_TCP_STORE)"
)
TIMES = (  # of sbatch
    re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)
UNIT_S = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def _option(text: str) -> str:
    """Hold an option of sbatch to `--name` or `--name=value`, and to names that are not Basestone's own."""
    name, has_value, _ = text.removeprefix("--").partition("=")
    if any(letter.isspace() for letter in name) and not has_value:
        raise ValueError(f"a blank after the name is not read there; write --{'='.join(name.split(None, 1))}")
    # sbatch takes any beginning of a name that is the beginning of no other.
    if name.startswith("ntasks") or any(own.startswith(name) for own in OWN_OPTIONS):
        raise ValueError(f"--{name} is set by Basestone itself, or would undo what it needs; leave it out")
    return text


def _variable(name: str) -> str:
    if OWN_VARIABLES.fullmatch(name):
        raise ValueError(f"{name} is set by Basestone for each rank; leave it out")
    return name


def _time(text: str) -> str:
    seconds_of(text)
    return text


def seconds_of(text: str) -> int:
    """Give the seconds of a time as sbatch reads it, such as `90`, `24:00:00` or `1-12`.

    Raises:
        ValueError: it is none.
    """
    for pattern in TIMES:
        if match := pattern.fullmatch(text):
            return sum(int(value or 0) * UNIT_S[unit] for unit, value in match.groupdict().items())
    raise ValueError(
        "expected MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]"
    )


class SlurmSection(Section):
    """`[slurm]`: how jobs are asked for."""

    partition: Word | None = Field(None, description="partition")
    account: Word | None = Field(None, description="account")
    qos: Word | None = Field(None, description="quality of service")
    reservation: Word | None = Field(None, description="reservation")
    constraint: OneLine | None = Field(None, description="features that nodes must have")
    exclude: Word | None = Field(None, description="nodes to leave out, e.g. n[07-09]")
    time: Annotated[str, AfterValidator(_time)] | None = Field(
        None, description="time limit of one start, e.g. 24:00:00"
    )
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs to ask for; by default one a process")
    cpus_per_task: int | None = Field(None, gt=0, description="CPUs of a node to ask for")
    exclusive: bool = Field(True, description="ask for whole nodes")
    signal_s: int = Field(120, gt=0, description="seconds before the time limit at which a run is to save")
    max_requeues: int = Field(100, ge=0, description="requeues after a time limit or a preemption")
    array: int = Field(0, ge=0, description="in place of requeues: so many jobs, one after the other")
    modules: tuple[Word, ...] = Field((), strict=False, description="environment modules to load")
    container_image: OneLine | None = Field(None, description="image to run in")
    container_mounts: tuple[OneLine, ...] = Field((), strict=False, description="what it sees, HOST:CONTAINER")
    container: Literal["pyxis", "apptainer"] = Field("pyxis", description="what runs the image")
    options: tuple[
        Annotated[str, StringConstraints(pattern=r"^--[a-z][^\n\r\x00]*$"), AfterValidator(_option)], ...
    ] = Field((), strict=False, description="further options of sbatch, e.g. --mail-type=END")

    @model_validator(mode="after")
    def _saves_in_time(self) -> Self:
        limit_s = seconds_of(self.time) if self.time is not None else 0
        if limit_s and self.signal_s >= limit_s:  # 0 is no limit
            raise ValueError(
                f"signal_s = {self.signal_s} is not below time = {self.time!r}, {limit_s} s: the run would be told to "
                "save before it begins; give it more time, or a shorter signal_s"
            )
        return self

    @model_validator(mode="after")
    def _mounts_are_read_as_meant(self) -> Self:
        if bad := [mount for mount in self.container_mounts if "," in mount or mount.count(":") > 2]:
            raise ValueError(
                f"container_mounts: {', '.join(map(repr, bad))}: {self.container} reads , and : as ends of paths; give "
                "HOST:CONTAINER, by a link without them where the path has some"
            )
        return self


class KubernetesSection(Section):
    """`[kubernetes]`: how pods are asked for."""

    kind: Literal["JobSet", "TrainJob"] = Field("JobSet", description="JobSet, or Kubeflow Trainer's TrainJob")
    namespace: Label | None = Field(None, description="namespace")
    image: OneLine = Field("basestone:latest", description="image of the pods")
    claim: Label | None = Field(
        None, description="PersistentVolumeClaim with runs and data, shared by all pods"
    )
    mount: OneLine = Field("/runs", description="where pods see the claim")
    shm_gb: int = Field(64, gt=0, description="size of /dev/shm")
    gpu_resource: Word = Field("nvidia.com/gpu", description="what a GPU is called")
    secret: Label | None = Field(None, description="Secret that holds the variables of `secrets`")
    service_account: Label | None = Field(None, description="service account of the pods")
    queue: Label | None = Field(None, description="Kueue's local queue")
    node_selector: dict[str, str] = Field({}, description="labels that nodes must have")
    grace_s: int = Field(300, gt=0, description="seconds that a pod has to save when it is told to go")


class ClusterConfig(Section):
    """The file; every key has a default, and without a file there is nothing to say."""

    processes_per_node: int | None = Field(None, gt=0, description="one per GPU; by default as many as here")
    python: OneLine | None = Field(None, description="the interpreter on the nodes; by default this one")
    interface: Word | None = Field(None, description="network interface for gloo and NCCL, e.g. ib0")
    max_restarts: int = Field(3, ge=0, description="starts after failures that made no progress")
    env: dict[Annotated[Name, AfterValidator(_variable)], Value] = Field(
        {}, description="variables of every process"
    )
    secrets: tuple[Name, ...] = Field(
        (), strict=False, description="variables that nothing shows, by their names"
    )
    preflight: PreflightSection = PreflightSection()
    slurm: SlurmSection = SlurmSection()
    kubernetes: KubernetesSection = KubernetesSection()


def load_cluster(path: Path | None) -> ClusterConfig:
    """Read a cluster file, or give the defaults.

    Raises:
        ConfigError: it cannot be read, or keys or values are wrong: all of them at once.
    """
    if path is None:
        return ClusterConfig()
    return validated(ClusterConfig, read_toml(path, "cluster file"), str(path))
