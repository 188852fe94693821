"""From a command line to a launch: everything is checked before anything is written or started. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...data.storage import write_atomic
from ...trainer.config import ResolvedRun, RunConfig
from ...trainer.errors import ConfigError
from ...trainer.load import load_run, run_to_toml
from ...trainer.places import locate, vocab_size
from ...trainer.plan import describe
from ...trainer.rundir import make_run_directory
from .. import environ
from . import hosts as by_ssh
from . import jobs, kubernetes, node, outcome, slurm
from .config import ClusterConfig, load_cluster
from .hostfile import Host, read_hostfile
from .job import FOLDER, Job, new_name
from .plan import Plan, make_plan, port_of
from .supervise import Supervisor

NODES = re.compile(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?")


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    run_file: Path
    backend: str
    nodes: str
    processes_per_node: int | None
    hostfile: Path | None
    endpoint: str | None
    cluster_file: Path | None
    run_dir: Path
    overrides: list[str]
    resume: str | None
    check: bool
    debug: bool


@dataclass(frozen=True)
class Launching:
    """A launch that is ready: its job, what it runs, and the lines that tell people about it.

    `folder` is where its files go here; only pods have their run directory elsewhere.
    """

    job: Job
    cluster: ClusterConfig
    hosts: list[Host]
    folder: Path
    plan: Plan
    described: list[tuple[str, str]]


def prepare(request: Request, cache: Path) -> Launching:
    """Check what was asked for and plan it; nothing is written.

    Raises:
        ConfigError: the run file, the cluster file, the hostfile or a flag is wrong, or the layout does not fit.
    """
    run = load_run(request.run_file, request.overrides)
    cluster = load_cluster(request.cluster_file)
    hosts = read_hostfile(request.hostfile) if request.hostfile is not None else []
    if hosts and request.backend not in ("hosts", "mpi"):
        raise ConfigError(f"--hostfile is for --on hosts and --on mpi (got --on {request.backend})")
    low, high = _nodes(request, hosts)
    per_node = _processes_per_node(request, run, cluster, hosts)
    if request.backend == "local" and high > 1:
        raise ConfigError(
            f"--on local is one machine (got --nodes {request.nodes}); take hosts, torchrun, slurm, ..."
        )
    resolved = _resolve(run, cache, low, high, per_node)
    job = Job(
        name=new_name(request.run_file.stem, _shared_name(request)),
        backend=request.backend,
        run_file=kubernetes.RUN_FILE if request.backend == "kubernetes" else str(request.run_file),
        run_dir=str(PurePosixPath(cluster.kubernetes.mount) / request.run_dir.name)
        if request.backend == "kubernetes"
        else str(request.run_dir),
        min_nodes=low,
        max_nodes=high,
        processes_per_node=per_node,
        overrides=request.overrides,
        resume=request.resume,
        debug=request.debug,
        endpoint=request.endpoint or (node.HERE if high == 1 else None),
        interface="lo" if request.backend == "local" else cluster.interface,
        max_restarts=cluster.max_restarts,
        environment=cluster.env,
        secrets=list(cluster.secrets),
        check=request.check,
        preflight=cluster.preflight.model_dump(),
        options={"python": cluster.python or sys.executable, **slurm.options_of(cluster.slurm)},
    )
    if request.backend == "slurm" and cluster.slurm.gpus_per_node is None and environ.num_gpus():
        cluster = cluster.model_copy(
            update={"slurm": cluster.slurm.model_copy(update={"gpus_per_node": per_node})}
        )
    folder = request.run_dir / FOLDER
    plan = make_plan(job, cluster, hosts[:high], folder, run_to_toml(run.model_dump()))
    described = [line for line in describe(resolved, request.run_dir) if line[0] in SHOWN]
    described.append(("nodes", f"{request.nodes or high} x {per_node} process(es), by {request.backend}"))
    return Launching(job, cluster, hosts, folder, plan, described)


def _shared_name(request: Request) -> str | None:
    """Give what every node of a launch knows, where each has a command of its own."""
    return f"{request.run_dir} {request.endpoint}" if request.backend == "torchrun" else None


SHOWN = ("run directory", "model", "parameters", "layout", "batch", "length", "memory")


def _nodes(request: Request, hosts: list[Host]) -> tuple[int, int]:
    if not request.nodes:
        return len(hosts) or 1, len(hosts) or 1
    match = NODES.fullmatch(request.nodes)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ConfigError(
            f"--nodes {request.nodes}: expected a number, or MIN:MAX with MIN not above MAX, e.g. 2:4"
        )
    low, high = int(match[1]), int(match[2] or match[1])
    if hosts and high > len(hosts):
        raise ConfigError(f"--nodes {request.nodes}: {request.hostfile} names {len(hosts)} host(s)")
    if low != high and request.backend in ("mpi", "kubernetes"):
        raise ConfigError(f"--nodes {request.nodes}: --on {request.backend} needs one number of nodes")
    return low, high


def _processes_per_node(request: Request, run: RunConfig, cluster: ClusterConfig, hosts: list[Host]) -> int:
    wanted = request.processes_per_node or cluster.processes_per_node
    if hosts:
        if wanted is not None and wanted != hosts[0].slots:
            raise ConfigError(f"{wanted} processes a node, but {request.hostfile} has slots={hosts[0].slots}")
        return hosts[0].slots
    return wanted or run.run.processes or max(1, environ.num_gpus())


def _resolve(run: RunConfig, cache: Path, low: int, high: int, per_node: int) -> ResolvedRun:
    """Lay the run out over the most nodes, and see that every number of nodes that may be left works, too."""
    vocabulary = vocab_size(locate(run.data, run.reading, cache, lambda text: print(text, file=sys.stderr)))
    resolved = run.resolve(high * per_node, vocabulary)
    problems = []
    for nodes in range(low, high):
        try:
            run.resolve(nodes * per_node, vocabulary)
        except ConfigError as error:
            problems.append(f"  {nodes} node(s): {str(error).splitlines()[0]}")
    if problems:
        raise ConfigError(
            f"--nodes {low}:{high}: the run cannot go on with every number of nodes between:\n"
            + "\n".join(problems)
            + "\nelastic runs change data parallelism alone: choose train.global_batch and MIN so that all fit"
        )
    return resolved


def start(launching: Launching) -> int:
    """Write the launch's files and run it; give the exit code.

    Raises:
        ConfigError: something that it needs is not there.
    """
    job = launching.job
    secrets = environ.variables(tuple(job.secrets)) if job.backend != "kubernetes" else {}
    _check_tools(launching)
    make_run_directory(launching.folder.parent)
    if job.backend != "kubernetes":
        outcome.begin(job)
        job.write(secrets)
    launching.folder.mkdir(exist_ok=True)
    for path, content in launching.plan.files.items():
        write_atomic(path, content.encode())
    if job.backend in ("slurm", "kubernetes"):
        return _submit(launching)
    if job.backend == "torchrun":
        jobs.record(job, launching.folder, "")
        return node.run_node(job)
    jobs.record(job, launching.folder, "")
    try:
        return _supervise(launching)
    finally:
        job.forget_secrets()


def _check_tools(launching: Launching) -> None:
    if launching.job.backend == "hosts":
        by_ssh.check_tools(launching.job.options["python"])
    needed = {"mpi": "mpirun", "slurm": "sbatch", "kubernetes": "kubectl"}.get(launching.job.backend)
    if needed is not None and shutil.which(needed) is None:
        raise ConfigError(
            f"--on {launching.job.backend}: there is no {needed} on the PATH here; go where there is one (a login "
            "node, after `module load`), or choose another --on"
        )


def _submit(launching: Launching) -> int:
    (command,) = launching.plan.commands
    done = subprocess.run(command, cwd=launching.plan.directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"{command[0]} refused the job: {done.stderr.strip() or done.stdout.strip()}")
    identity = done.stdout.strip().partition(";")[0] if launching.job.backend == "slurm" else launching.job.name
    jobs.record(launching.job, launching.folder, identity)
    print(
        f"{launching.job.backend} job {identity}; basestone jobs ls {launching.folder.parents[1]} tells how it is"
    )
    return 0


def _supervise(launching: Launching) -> int:
    job, plan = launching.job, launching.plan
    environment = {**environ.agent_environment(job.environment), **plan.environment}
    command: Callable[[], list[str]] = lambda: plan.commands[0]  # noqa: E731
    clean_up: Callable[[], None] = lambda: None  # noqa: E731
    if job.backend == "hosts":
        environment = by_ssh.runner_environment()
        present: list[Host] = []

        def command() -> list[str]:
            present[:] = by_ssh.present_hosts(job, launching.hosts)
            by_ssh.write_hostfile(job.folder / "hostfile", present)
            return by_ssh.runner_command(job, present, port_of(job))

        def clean_up() -> None:
            by_ssh.reap_everywhere(job, by_ssh.reachable(launching.hosts)[0])

    return Supervisor(job, command, environment).run(clean_up).exit_code
