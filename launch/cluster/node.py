"""One node of a launch: torchrun with the ranks of this node, `python -m basestone.launch.cluster.node TOKEN`.

Imports no torch itself.
"""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path

from ...trainer.errors import EXIT_FAULT, EXIT_STOPPED, BasestoneError, ConfigError, exit_code_of, message_of
from ...trainer.rundir import STOP
from .. import environ
from . import ends, outcome
from .job import Job, decode, read_job
from .joining import joined
from .launcher import Asked, run_launcher, say

MEET_S = 300  # that a node waits for the others
PORT = 29400
HERE = "localhost:0"  # for one node: any port


def main() -> None:
    """Be a node."""
    try:
        job = read_job(decode(sys.argv[1]))
        if job.backend == "kubernetes":  # its file came as a ConfigMap
            with joined(job, lambda: _write(job)):
                code = run_node(job)
        else:
            code = run_node(job)
    except BasestoneError as error:
        print(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        code = exit_code_of(error)
    sys.exit(code)


def run_node(job: Job) -> int:
    """Run this node's ranks to their end, with restarts in place; give the run's exit code.

    Raises:
        ConfigError: nobody says where nodes meet, or this node cannot listen there.
    """
    endpoint = environ.endpoint() if job.backend in ("slurm", "kubernetes") else job.endpoint
    if endpoint is None:
        raise ConfigError("nobody says where the nodes meet; give --endpoint HOST:PORT, the same on every node")
    check_endpoint(endpoint)
    asked = Asked(job, outcome.BY_A_NODE)
    with asked.listening():
        command, environment = agent_command(job, endpoint), environ.agent_environment(job.environment)
        found = outcome.outcome(job, run_launcher(command, environment, job.folder, asked))
    if (end := ends.cause(job.folder)) is not None and found.exit_code not in (0, EXIT_STOPPED):
        say(f"error: {end.tell()}")
    elif found.exit_code == EXIT_FAULT:
        say(f"error: torchrun ended without a rank's word; did all nodes meet at {endpoint} within {MEET_S} s?")
    if found.is_final:
        asked.take_back()
    if job.check and asked.signals:
        return EXIT_STOPPED
    if job.backend == "kubernetes" and found.exit_code == EXIT_STOPPED and not asked.signals:
        return 0  # somebody asked the run to stop: the pods are not to be made anew
    return found.exit_code


def _write(job: Job) -> None:
    """Write the job where the pods' run directory is; of another launch than before, take its requests back."""
    if not job.path.exists() or job.path.read_text() != job.as_json():
        (Path(job.run_dir) / STOP).unlink(missing_ok=True)
    job.write({})


def agent_command(job: Job, endpoint: str) -> list[str]:
    """Give torchrun's command line; the ranks' own is the same everywhere."""
    restarts = (
        job.max_restarts if job.backend in ("torchrun", "kubernetes") else 0
    )  # the others start nodes anew
    return [
        sys.executable,
        *("-m", "torch.distributed.run"),
        f"--nnodes={job.min_nodes}:{job.max_nodes}",
        f"--nproc-per-node={job.processes_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={job.name}",
        # A node that dies is missed within seconds, and whoever is left does not wait half a minute for more.
        f"--rdzv-conf=join_timeout={MEET_S},last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3",
        f"--max-restarts={restarts}",
        *("-m", "basestone.launch.cluster.rank", job.token),
    ]


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Give host and port.

    Raises:
        ConfigError: it is no endpoint.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"endpoint {endpoint}: expected HOST:PORT, e.g. node-1:{PORT}")
    return host, int(port)


def check_endpoint(endpoint: str) -> None:
    """See that the endpoint has an address, and is free where it is on this machine.

    Raises:
        ConfigError: it is not.
    """
    if endpoint == HERE:
        return
    host, port = parse_endpoint(endpoint)
    try:
        address = socket.getaddrinfo(host, port, socket.AF_UNSPEC, socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(
            f"endpoint {endpoint}: {socket.gethostname()} knows no address of {host} ({error}); give an address"
        ) from error
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except PermissionError as error:
            raise ConfigError(
                f"endpoint {endpoint}: port {port} is not for users; take one above 1023"
            ) from error
        except OSError as error:
            if not _is_elsewhere(error):
                raise ConfigError(
                    f"endpoint {endpoint}: port {port} is taken on {socket.gethostname()} ({error.strerror}); "
                    "another run? give another --endpoint"
                ) from error


def _is_elsewhere(error: OSError) -> bool:
    """Tell whether the address is another machine's."""
    return error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL)


if __name__ == "__main__":
    main()
