"""Two nodes on this machine for the tests of a module, with sshd or Slurm on them where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import nodes, slurm, ssh
from cluster.nodes import Cluster
from cluster.slurm import Slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Nodes n0 and n1. A test that takes one away brings it back."""
    if reason := nodes.why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as running:
        yield running


@pytest.fixture(scope="module")
def ssh_cluster(cluster) -> Cluster:
    """The same nodes with sshd."""
    if reason := ssh.why_not():
        pytest.skip(reason)
    ssh.start_sshd(cluster)
    return cluster


@pytest.fixture(scope="module")
def slurm_cluster(cluster) -> Slurm:
    """Slurm on the same nodes."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    running = Slurm(cluster)
    running.start()
    return running
