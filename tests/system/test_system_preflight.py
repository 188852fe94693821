"""Nodes that are not fit to train are named before training, with the fix: faults planted in a cluster of two."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster.nodes import Cluster, Node, NodeProcess, why_missing
from commands import command, environment
from small_corpus import make_corpus

pytestmark = pytest.mark.system
PORT = 29400
LIMIT_S = 100.0  # for both launches, their starts of Python included


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with shards/, tokenizer.model and run.toml."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@contextmanager
def started(
    cluster: Cluster, corpus: Path, run_dir: Path, *more: object, **variables: str
) -> Iterator[list[NodeProcess]]:
    """Check a launch on both nodes; `variables` are n1's."""
    line = [
        *("launch", corpus / "run.toml", "--on", "torchrun", "--nodes", 2, "--processes-per-node", 1),
        *("--endpoint", f"n0:{PORT}", "--run-dir", run_dir, "--check", *more),
    ]
    processes = [
        node.popen(
            command(*line),
            env=environment() | (variables if node.index else {}),
            cwd=corpus,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in cluster.nodes
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def launch(*arguments: object, **variables: str) -> list[tuple[int, str]]:
    """Check a launch on both nodes to its end; give the exit code and the output of each."""
    deadline_s = time.monotonic() + LIMIT_S
    with started(*arguments, **variables) as processes:
        said = [process.communicate(timeout=deadline_s - time.monotonic())[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def refusal(*arguments: object, **variables: str) -> str:
    """See that both nodes leave with 64, and give what the first one said."""
    said = launch(*arguments, **variables)
    assert [code for code, _ in said] == [64, 64], said
    return said[0][1]


def test_two_nodes_that_are_the_same_pass(cluster, corpus, tmp_path):
    said = launch(cluster, corpus, tmp_path / "run")
    assert [code for code, _ in said] == [0, 0], said
    assert re.search(
        r"preflight: 2 node\(s\), 2 rank\(s\), clocks within [\d.]+ ms, all-reduce [\d.]+ GB/s at 16 MiB",
        said[0][1],
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_host_name_of_loopback_is_named(cluster, corpus, tmp_path):
    node = cluster.nodes[1]
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 n1\n10.77.0.10 n0\n")
    node.run(["mount", "--bind", hosts, "/etc/hosts"])
    try:
        said = refusal(cluster, corpus, tmp_path / "run")
    finally:
        node.run(["umount", "/etc/hosts"])
    assert (
        "n1: the host name n1 resolves to 127.0.1.1, where other nodes cannot connect: set `interface`" in said
    )
    assert "to one of eth0 (10.77.0.11), or mend /etc/hosts" in said


def test_a_run_directory_that_is_not_shared_is_named(cluster, corpus, tmp_path):
    run_dir, node = tmp_path / "run", cluster.nodes[1]
    run_dir.mkdir()
    (tmp_path / "elsewhere").mkdir()
    node.run(["mount", "--bind", tmp_path / "elsewhere", run_dir])
    try:
        said = refusal(cluster, corpus, run_dir)
    finally:
        node.run(["umount", run_dir])
    assert f"{run_dir} is another directory on n1: put it on a disk that all nodes share" in said


def test_other_sources_on_a_node_are_named(cluster, corpus, tmp_path):
    root = Path(__file__).parents[2]
    copy = tmp_path / "copy"
    for folder in ("basestone", "launch", "trainer", "model", "data", "ds_configs"):
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "data" / "order.py").open("a") as file:
        file.write("# changed\n")
    said = refusal(cluster, corpus, tmp_path / "run", PYTHONPATH=str(copy))
    assert re.search(
        r"the sources of basestone differ: \w{12} on n0; \w{12} on n1: install the same every", said
    )


def test_another_run_on_a_node_is_named(cluster, corpus, tmp_path):
    node = cluster.nodes[1]
    other = tmp_path / "run.toml"
    other.write_text((corpus / "run.toml").read_text().replace("lr = 3e-3", "lr = 3e-4"))
    node.run(["mount", "--bind", other, corpus / "run.toml"])
    try:
        said = refusal(cluster, corpus, tmp_path / "run")
    finally:
        node.run(["umount", corpus / "run.toml"])
    assert re.search(
        r"run file \[optimizer\] differs: \w{12} on n0; \w{12} on n1: give every node the same", said
    )


def test_frames_that_the_path_does_not_carry_are_told(cluster, corpus, tmp_path):
    """The nodes send frames of 9000 bytes, and the bridge between them drops what is over 1500."""
    change(cluster.nodes, "ip", "link", "set", "dev", "eth0", "mtu", "9000", "gso_max_segs", "1")
    try:
        said = refusal(cluster, corpus, tmp_path / "run", "--cluster", limits(tmp_path, "collective_s = 5.0"))
    finally:
        change(cluster.nodes, "ip", "link", "set", "dev", "eth0", "mtu", "1500", "gso_max_segs", "65535")
    assert "n0, n1: an all-reduce of" in said
    assert "small messages pass and large ones hang: look at the MTU along the path" in said


def test_a_slow_link_is_refused(cluster, corpus, tmp_path):
    if reason := why_missing({"tc": "iproute2"}):
        pytest.skip(reason)
    node = cluster.nodes[1]
    shape = [
        "tc",
        "qdisc",
        "add",
        "dev",
        "eth0",
        "root",
        "tbf",
        "rate",
        "200mbit",
        "burst",
        "64k",
        "latency",
        "400ms",
    ]
    done = node.run(shape, check=False)
    if done.returncode:
        pytest.skip(f"no traffic shaping here: {done.stderr.strip()}")
    try:
        wanted = limits(tmp_path, "min_all_reduce_gb_per_s = 0.1")
        said = refusal(cluster, corpus, tmp_path / "run", "--cluster", wanted)
    finally:
        node.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert re.search(r"an all-reduce of 16 MiB has 0\.0[\d]+ GB/s, and min_all_reduce_gb_per_s is 0\.1", said)


def limits(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(f"[preflight]\n{text}\n")
    return path


def change(nodes: list[Node], *line: str) -> None:
    for node in nodes:
        node.run(line)


def test_a_node_that_never_starts_is_missed(cluster, corpus, tmp_path):
    """n1's agent is there, and its rank is not: Python hangs before it reports."""
    stuck = tmp_path / "stuck"
    stuck.mkdir()
    (stuck / "sitecustomize.py").write_text(
        "import sys, time\nif 'basestone.trainer.worker' in sys.orig_argv:\n    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    wanted = limits(tmp_path, "report_s = 8.0")
    arguments = (cluster, corpus, tmp_path / "run", "--cluster", wanted)
    with started(*arguments, PYTHONPATH=f"{stuck}:{root}") as (first, _):
        told = next((line for line in first.stdout if "did not report" in line), "")  # n1's agent has not ended
    assert "rank(s) 1 of 2 did not report within 8 s (n0 did): look whether their nodes are up" in told
