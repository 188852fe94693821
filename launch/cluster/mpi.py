"""mpirun: ranks straight away, with their numbers from Open MPI or MPICH. Imports no torch."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from .hostfile import Host
from .job import Job


def mpirun_command(job: Job, hosts: Sequence[Host], sent_on: Sequence[str], *, as_root: bool) -> list[str]:
    """Give Open MPI's command line; the ranks meet at the first host, and get the variables of these names."""
    num_ranks = sum(host.slots for host in hosts)
    interface = ["--mca", "btl_tcp_if_include", job.interface, "--mca", "oob_tcp_if_include", job.interface]
    return [
        "mpirun",
        *(["--allow-run-as-root"] if as_root else []),
        *("-n", str(num_ranks)),
        *("--host", ",".join(f"{host.name}:{host.slots}" for host in hosts)),
        *("--bind-to", "none"),  # else two ranks have a core each, whatever threads they have
        *(word for word in interface if job.interface is not None and word is not None),
        *("--mca", "plm_rsh_args", "-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"),
        *(word for name in sent_on for word in ("-x", name)),
        *(job.options["python"], "-m", "basestone.launch.cluster.rank", job.token),
    ]


def elsewhere(hosts: Sequence[Host]) -> list[Host]:
    """Give the hosts that mpirun needs ssh for."""
    here = ("localhost", "127.0.0.1", socket.gethostname())
    return [host for host in hosts if host.name not in here]
