"""Slurm on the nodes of a cluster: munge, slurmctld on n0 and slurmd everywhere. No database, no control groups."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

from cluster.nodes import Cluster, Node, wait_until, why_missing

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
READY_TIMEOUT_S = 60.0
CONFIG = """\
ClusterName=basestone
SlurmctldHost=n0({address})
SlurmUser=root
AuthType=auth/munge
# Also how long a requeued job waits before it may start again: 120 s without it.
AuthInfo=cred_expire=5
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
# A node that comes back is used again.
ReturnToService=2
SlurmctldTimeout=30
# A node that is silent for so long is down, and its jobs are requeued.
SlurmdTimeout=10
InactiveLimit=0
KillWait=10
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,sched_interval=2
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# Nothing is constrained; but without this line slurmd looks for a file system of control groups, and ends.
CGROUP_CONFIG = "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\n"


def why_not() -> str | None:
    """Say why there can be no Slurm here, or None where there can."""
    return why_missing(PACKAGES)


class Slurm:
    """Slurm on a cluster, with the partitions `low` (the default; its jobs are requeued for others) and `high`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.directory = cluster.directory / "slurm"
        self.config = self.directory / "slurm.conf"
        (self.directory / "state").mkdir(parents=True)
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        cpus = len(os.sched_getaffinity(0))
        nodes = [
            f"NodeName={node.name} NodeAddr={node.address} CPUs={cpus} Boards=1 SocketsPerBoard=1"
            f" CoresPerSocket={cpus} ThreadsPerCore=1 State=UNKNOWN"
            for node in cluster.nodes
        ]
        values = {"address": cluster.nodes[0].address, "directory": self.directory, "nodes": "\n".join(nodes)}
        self.config.write_text(CONFIG.format(**values))
        (self.directory / "cgroup.conf").write_text(CGROUP_CONFIG)

    def start(self) -> None:
        """Start Slurm on every node, and on each that comes back; return when all are idle."""
        self.cluster.add_service(self._boot)
        self.wait_idle(len(self.cluster.nodes))

    def environment(self) -> dict[str, str]:
        """The test's environment and where Slurm's configuration is."""
        return {**os.environ, "SLURM_CONF": str(self.config)}

    def run(self, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm on n0; `options` are those of Node.run but `env`."""
        return self.cluster.nodes[0].run(argv, env=self.environment(), **options)

    def wait_idle(self, num_nodes: int) -> None:
        """Wait until so many nodes are idle; raise with the end of the logs where they are not in a minute."""

        def idle() -> bool:
            done = self.run(
                "sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D", check=False
            )
            return done.stdout.split() == [str(num_nodes)]

        try:
            wait_until(idle, f"{num_nodes} idle nodes", READY_TIMEOUT_S)
        except TimeoutError as error:
            logs = [f"{log.name}: {log.read_text()[-1000:]}" for log in sorted(self.directory.glob("*.log"))]
            raise RuntimeError("\n".join([str(error), *logs])) from None

    def _boot(self, node: Node) -> None:
        _start_munge(node, self.directory / "munge.key")
        node.run(["mkdir", "-p", "/run/slurmd"])
        if node.index == 0:
            node.run(["slurmctld", "-f", self.config], env=self.environment())
        node.run(["slurmd", "-f", self.config], env=self.environment())


def _start_munge(node: Node, key: Path) -> None:
    owner = ["-o", "munge", "-g", "munge"]
    node.run(["install", "-d", *owner, "/run/munge"])
    node.run(["install", *owner, "-m", "600", key, "/run/munge/key"])
    files = {
        "key-file": "key",
        "socket": "munge.socket.2",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    options = [f"--{option}=/run/munge/{name}" for option, name in files.items()]
    node.run(["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", *options])
