"""From a command line to a launch: everything is checked before anything is written or started. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...data.reading.transport import is_local
from ...data.storage import write_atomic
from ...trainer.config import ResolvedRun, RunConfig
from ...trainer.errors import ConfigError
from ...trainer.load import load_run, run_to_toml
from ...trainer.places import open_run, vocab_size
from ...trainer.plan import describe
from ...trainer.run_lock import RunLock, is_held
from ...trainer.rundir import STOP
from .. import environ
from . import hosts as by_ssh
from . import jobs, kubernetes, mpi, node, places, slurm
from .config import ClusterConfig, load_cluster
from .hostfile import Host, read_hostfile
from .job import CHECK, FOLDER, Job, new_name
from .joining import is_taken, joined
from .launcher import say
from .plan import Plan, make_plan, port_of
from .supervise import Supervisor, forget

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
    _check_endpoint(request, high)
    resolved = _resolve(run, cache, low, high, per_node)
    name = new_name(request.run_file.stem, _shared_name(request))
    job = Job(
        name=name,
        backend=request.backend,
        run_file=kubernetes.RUN_FILE if request.backend == "kubernetes" else str(request.run_file),
        run_dir=str(PurePosixPath(cluster.kubernetes.mount) / request.run_dir.name)
        if request.backend == "kubernetes"
        else str(request.run_dir),
        min_nodes=low,
        max_nodes=high,
        processes_per_node=per_node,
        overrides=request.overrides,
        resume=_resume(request),
        debug=request.debug,
        endpoint=request.endpoint or (node.HERE if high == 1 else None),
        interface="lo" if request.backend == "local" else cluster.interface,
        max_restarts=cluster.max_restarts,
        environment=cluster.env,
        secrets=list(cluster.secrets),
        check=request.check,
        preflight=cluster.preflight.model_dump(),
        options={"python": cluster.python or sys.executable, **slurm.options_of(cluster.slurm)}
        | ({"kubernetes": kubernetes.identity(name, cluster)} if request.backend == "kubernetes" else {}),
    )
    if request.backend == "slurm" and cluster.slurm.gpus_per_node is None and environ.num_gpus():
        cluster = cluster.model_copy(
            update={"slurm": cluster.slurm.model_copy(update={"gpus_per_node": per_node})}
        )
    folder = request.run_dir / (CHECK if request.check else FOLDER)
    plan = make_plan(job, cluster, hosts[:high], folder, run_to_toml(run.model_dump()))
    described = [line for line in describe(resolved, request.run_dir) if line[0] in SHOWN]
    described.append(("nodes", f"{request.nodes or high} x {per_node} process(es), by {request.backend}"))
    return Launching(job, hosts, folder, plan, described)


def _shared_name(request: Request) -> str | None:
    """Give what every node of a launch knows, where each has a command of its own."""
    return f"{request.run_dir} {request.endpoint}" if request.backend == "torchrun" else None


SHOWN = ("run directory", "model", "parameters", "layout", "batch", "length", "memory a rank")


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


def _resume(request: Request) -> str | None:
    """Give what to go on from, as every node can read it; what pods see is not seen from here."""
    if request.resume is None or not is_local(request.resume) or request.backend == "kubernetes":
        return request.resume
    if not (path := Path(request.resume).resolve()).is_dir():
        raise ConfigError(
            f"--resume {request.resume}: there is no such directory; give a step directory, e.g. "
            f"{request.run_dir}/checkpoints/step_00000400"
        )
    return str(path)


def _check_endpoint(request: Request, nodes: int) -> None:
    if request.backend == "torchrun" and nodes > 1 and request.endpoint is None:
        raise ConfigError("--on torchrun needs --endpoint HOST:PORT for several nodes, the same on every node")
    if request.endpoint is not None:
        if request.backend != "torchrun":
            raise ConfigError(f"--endpoint is for --on torchrun (got --on {request.backend})")
        node.parse_endpoint(request.endpoint)


def _processes_per_node(request: Request, run: RunConfig, cluster: ClusterConfig, hosts: list[Host]) -> int:
    wanted = request.processes_per_node or cluster.processes_per_node
    if hosts:
        if wanted is not None and wanted != hosts[0].slots:
            raise ConfigError(f"{wanted} processes a node, but {request.hostfile} has slots={hosts[0].slots}")
        return hosts[0].slots
    gpus = environ.num_gpus()
    if request.backend == "local" and wanted is not None and wanted > gpus > 0:
        raise ConfigError(
            f"{wanted} processes, but this machine has {gpus} GPU(s) and every process needs its own; give fewer, or "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return wanted or run.run.processes or max(1, gpus)


def _resolve(run: RunConfig, cache: Path, low: int, high: int, per_node: int) -> ResolvedRun:
    """Lay the run out over the most nodes, and see that every number of nodes that may be left works, too."""
    resolved, found = open_run(run, high * per_node, cache, lambda text: print(text, file=sys.stderr))
    vocabulary = vocab_size(found)
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
        ConfigError: something that it needs is not there, or the run goes on already.
    """
    job, run_dir = launching.job, launching.folder.parent
    secrets = environ.variables(tuple(job.secrets)) if job.backend != "kubernetes" else {}
    _check_tools(job)
    if job.backend == "torchrun":
        node.check_endpoint(job.endpoint or node.HERE)
    jobs.check_queue(run_dir)
    if job.backend != "torchrun" or job.check:
        _check_free(job, run_dir)
    if job.backend == "torchrun":
        with joined(job, lambda: _write(launching, secrets)):
            return node.run_node(job)
    made = places.make(job, launching.folder)
    lock = RunLock(launching.folder)
    try:
        if job.backend == "kubernetes":
            return _submit(launching, made)
        _write(launching, secrets)
        if job.backend == "slurm":
            return _submit(launching, made)
        try:
            return _supervise(launching)
        finally:
            job.forget_secrets()
            if job.check:
                places.unmake([launching.folder, *made], launching.folder)
    finally:
        lock.close()


def _write(launching: Launching, secrets: dict[str, str]) -> None:
    job = launching.job
    if not job.check:
        forget(job)
        (Path(job.run_dir) / STOP).unlink(missing_ok=True)  # it was for an earlier launch
    job.write(secrets)
    for path, content in launching.plan.files.items():
        write_atomic(path, content.encode())
    if not job.check and job.backend != "slurm":
        jobs.record(job, launching.folder, "")


def _check_free(job: Job, run_dir: Path) -> None:
    """See that no run goes on, which a check would disturb, too.

    Raises:
        ConfigError: one does.
    """
    if is_held(run_dir) or (job.check and is_taken(run_dir / FOLDER)):
        raise ConfigError(
            f"{run_dir}: a run goes on in it already; `basestone jobs stop {run_dir}` lets it save and stop, or give "
            "another --run-dir"
        )


def _check_tools(job: Job) -> None:
    if job.backend == "hosts":
        by_ssh.check_tools(job.options["python"])
    needed = {"mpi": "mpirun", "slurm": "sbatch", "kubernetes": "kubectl"}.get(job.backend)
    if needed is not None and shutil.which(needed) is None:
        raise ConfigError(
            f"--on {job.backend}: there is no {needed} on the PATH here; go where there is one (a login node, after "
            "`module load`), or choose another --on"
        )


def _submit(launching: Launching, made: list[Path]) -> int:
    job, plan = launching.job, launching.plan
    if job.backend == "kubernetes":
        for path, content in plan.files.items():
            write_atomic(path, content.encode())
    (command,) = plan.commands
    # Schedulers keep the environment that they are given.
    known = {name: value for name, value in environ.child_environment().items() if name not in job.secrets}
    done = subprocess.run(command, cwd=plan.directory, env=known, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        job.forget_secrets()
        places.unmake(made, launching.folder)
        raise ConfigError(f"{command[0]} refused the job: {done.stderr.strip() or done.stdout.strip()}")
    if job.check:
        return _tell_of_check(launching, done.stdout)
    identity = done.stdout.strip().partition(";")[0] if job.backend == "slurm" else job.options["kubernetes"]
    jobs.record(job, launching.folder, identity)
    print(f"{job.backend} job {identity}; basestone jobs ls {launching.folder.parents[1]} tells how it is")
    return 0


def _tell_of_check(launching: Launching, said: str) -> int:
    """Say where a check in a queue will give its answer; what it made here stays for that."""
    job, number = launching.job, said.strip().partition(";")[0]
    if job.backend == "slurm":
        print(f"slurm job {number} checks its nodes; the answer comes in {launching.folder}/slurm-{number}.log")
    else:
        print(f"kubernetes job {job.name} checks its pods; the answer is in the log of its first pod")
    return 0


def _supervise(launching: Launching) -> int:
    job, plan = launching.job, launching.plan
    if job.backend == "mpi":
        environment = {**environ.agent_environment(job.environment), **plan.environment}

        def mpirun() -> list[str]:
            others = mpi.elsewhere(launching.hosts[: job.max_nodes])
            if shutil.which("ssh") and not environ.slurm():  # inside a job of Slurm mpirun needs no ssh
                by_ssh.present_hosts(others, len(others), len(others))
            return plan.commands[0]

        return Supervisor(job, mpirun, environment).run().exit_code
    if job.backend != "hosts":
        environment = {**environ.agent_environment(job.environment), **plan.environment}
        return Supervisor(job, lambda: plan.commands[0], environment).run().exit_code
    environment, odd = by_ssh.runner_environment()
    if odd:
        say(f"not sent to the hosts, for what a shell there would make of it: {', '.join(odd)}")

    def command() -> list[str]:
        present = by_ssh.present_hosts(launching.hosts, job.min_nodes, job.max_nodes)
        by_ssh.write_hostfile(job.folder / "hostfile", present)
        return by_ssh.runner_command(job, present, port_of(job))

    def clean_up() -> None:
        by_ssh.reap_everywhere(job, by_ssh.reachable(launching.hosts)[0])

    return Supervisor(job, command, environment, plan.directory).run(clean_up).exit_code
