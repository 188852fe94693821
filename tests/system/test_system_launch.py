"""Launches over two nodes with addresses of their own: torchrun, ssh and pdsh, mpirun, and a real Slurm."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster.nodes import Cluster, Node, NodeProcess, wait_until, why_missing
from cluster.slurm import Slurm
from commands import command, environment, losses_of, steps_of
from small_corpus import make_corpus
from whole_run import CHANGES, train

pytestmark = pytest.mark.system
STEPS, QUICKSTART_STEPS = 30, 6
END_S = 240.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with shards/, tokenizer.model and run.toml: tensor parallel over two ranks."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus) -> list[float]:
    """Losses of the same run by two processes of this machine."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    train(corpus, run_dir, f"train.steps={STEPS}")
    return losses_of(run_dir)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A folder whose run.toml is the quickstart's: 8 million parameters in bf16, tensor parallel over two ranks."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copy(Path(__file__).parents[2] / "recipes" / "quickstart.toml", folder / "run.toml")
    return folder


@pytest.fixture(scope="module")
def quickstart_losses(tmp_path_factory, quickstart) -> list[float]:
    """Its first losses by two processes of this machine."""
    run_dir = tmp_path_factory.mktemp("quickstart-losses") / "run"
    train(quickstart, run_dir, f"train.steps={QUICKSTART_STEPS}")
    return losses_of(run_dir)


def launch(corpus: Path, run_dir: Path, *arguments: object, steps: int = STEPS) -> list[str]:
    changes = [*CHANGES, f"train.steps={steps}"]
    sets = [word for change in changes for word in ("--set", change)]
    return command("launch", corpus / "run.toml", "--run-dir", run_dir, *sets, *arguments)


def begin(node: Node, line: list[str], log: Path, cwd: Path | None = None) -> NodeProcess:
    """Start a command on a node; what it says goes to a file."""
    with log.open("ab") as output:
        return node.popen(
            line, env=environment(), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )


@contextlib.contextmanager
def ending(*processes: NodeProcess) -> Iterator[None]:
    """Leave none of them behind."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ranks_on(node: Node) -> list[str]:
    """Give the ranks and workers that a node has."""
    done = node.run(["pgrep", "-af", "basestone.(trainer.worker|launch.cluster)"], check=False)
    return done.stdout.splitlines()


def events_of(run_dir: Path, kind: str) -> list[str]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record["message"] for record in map(json.loads, lines) if record["event"] == kind]


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    """Tell whether a run has come so far."""
    return lambda: (run_dir / "metrics.jsonl").exists() and max(steps_of(run_dir), default=0) >= step


# ---- torchrun -------------------------------------------------------------------------------------------------------


def test_torchrun_over_two_nodes_gives_the_losses_of_one_machine(
    cluster: Cluster, tmp_path, quickstart, quickstart_losses
):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    where = ("--on", "torchrun", "--nodes", 2, "--processes-per-node", 1, "--endpoint", "n0:29400")
    line = launch(quickstart, run_dir, *where, steps=QUICKSTART_STEPS)
    agents = [begin(node, line, log) for node in cluster.nodes]
    with ending(*agents):
        assert [agent.wait(END_S) for agent in agents] == [0, 0], log.read_text()
    assert losses_of(run_dir) == quickstart_losses
    assert events_of(run_dir, "start") == [f"{QUICKSTART_STEPS} steps on 2 process(es)"]


def test_the_run_goes_on_without_a_node_and_again_with_it(cluster: Cluster, tmp_path, corpus):
    run_dir, log, steps = tmp_path / "run", tmp_path / "log", 1000
    line = launch(
        corpus,
        run_dir,
        *("--on", "torchrun", "--nodes", "1:2", "--processes-per-node", 1, "--endpoint", "n0:29401"),
        *("--set", "parallel.tensor=1", "--set", "data.workers=0", "--set", "checkpoint.every_steps=20"),
        steps=steps,
    )
    first, second = cluster.nodes
    agent, other = begin(first, line, log), begin(second, line, log)
    with ending(agent, other):
        wait_until(reached(run_dir, 30), f"step 30: {log.read_text()}", END_S)
        second.run(["kill", "-9", "-1"], check=False)
        other.wait(30)
        wait_until(lambda: len(events_of(run_dir, "resume")) == 1, "a start without n1", END_S)
        back = begin(second, line, log)
        with ending(back):
            wait_until(lambda: len(events_of(run_dir, "resume")) == 2, "a start with n1 again", END_S)
            assert [agent.wait(END_S), back.wait(END_S)] == [0, 0], log.read_text()
    told = [message.partition(" on ")[2] for message in events_of(run_dir, "resume")]
    assert told == ["1 process(es)", "2 process(es)"]
    assert ranks_on(first) == ranks_on(second) == []
    serial = tmp_path / "serial"
    train(corpus, serial, "parallel.tensor=1", f"train.steps={min(200, steps)}", size=1)
    assert losses_of(run_dir)[:200] == pytest.approx(losses_of(serial)[:200], rel=1e-4)


# ---- ssh, pdsh and DeepSpeed's launcher ------------------------------------------------------------------------------


def hostfile(tmp_path: Path, *names: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text("".join(f"{name} slots=1\n" for name in names))
    return path


def test_hosts_by_deepspeeds_launcher_give_the_losses_of_one_machine(
    ssh_cluster: Cluster, tmp_path, quickstart, quickstart_losses
):
    run_dir, log = tmp_path / "run 'odd' $(id)", tmp_path / "log"
    line = launch(
        quickstart,
        run_dir,
        *("--on", "hosts", "--hostfile", hostfile(tmp_path, "n0", "n1")),
        steps=QUICKSTART_STEPS,
    )
    here = tmp_path / "a;touch planted;b $(touch planted) c"
    here.mkdir()
    agent = begin(ssh_cluster.nodes[0], line, log, here)
    with ending(agent):
        assert agent.wait(END_S) == 0, log.read_text()
    assert not list(tmp_path.rglob("planted")) and not any(
        Path(place, "planted").exists() for place in ("/", *(node.home for node in ssh_cluster.nodes))
    )
    assert losses_of(run_dir) == quickstart_losses


def test_a_rank_that_dies_on_another_host_is_started_again(ssh_cluster: Cluster, tmp_path, corpus, reference):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    line = launch(corpus, run_dir, "--on", "hosts", "--hostfile", hostfile(tmp_path, "n0", "n1"))
    agent = begin(ssh_cluster.nodes[0], line, log)
    with ending(agent):
        wait_until(reached(run_dir, 8), "step 8", END_S)
        ssh_cluster.nodes[1].run(["pkill", "-9", "-f", "basestone.trainer.worker"])
        assert agent.wait(END_S) == 0, log.read_text()
    assert "on n1 was killed by SIGKILL" in log.read_text()
    assert events_of(run_dir, "resume") and losses_of(run_dir) == reference
    assert [ranks_on(node) for node in ssh_cluster.nodes] == [[], []]


def test_the_run_goes_on_on_the_hosts_that_answer(ssh_cluster: Cluster, tmp_path, corpus):
    """n1 goes with its sshd, and the next start has n0 alone."""
    run_dir, log, (first, second) = tmp_path / "run", tmp_path / "log", ssh_cluster.nodes
    line = launch(
        corpus,
        run_dir,
        *("--on", "hosts", "--hostfile", hostfile(tmp_path, "n0", "n1"), "--nodes", "1:2"),
        *("--set", "parallel.tensor=1", "--set", "checkpoint.every_steps=5"),
        steps=200,
    )
    agent = begin(first, line, log)
    try:
        with ending(agent):
            wait_until(reached(run_dir, 20), f"step 20: {log.read_text()}", END_S)
            second.run(["kill", "-9", "-1"], check=False)
            assert agent.wait(END_S) == 0, log.read_text()
    finally:
        second.kill()
        second.start()
    assert [message.partition(" on ")[2] for message in events_of(run_dir, "resume")] == ["1 process(es)"]
    assert ranks_on(first) == []


def test_a_host_that_cannot_be_reached_is_named_before_anything_starts(ssh_cluster: Cluster, tmp_path, corpus):
    log = tmp_path / "log"
    line = launch(corpus, tmp_path / "run", "--on", "hosts", "--hostfile", hostfile(tmp_path, "n0", "n7"))
    agent = begin(ssh_cluster.nodes[0], line, log)
    with ending(agent):
        assert agent.wait(60) == 64, log.read_text()
    assert "1 of 2 host(s) cannot be reached by ssh, 2 are needed:\n  n7: " in log.read_text()


def test_mpirun_gives_the_losses_of_one_machine(ssh_cluster: Cluster, tmp_path, corpus, reference):
    if reason := why_missing({"mpirun": "openmpi-bin"}):
        pytest.skip(reason)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    line = launch(corpus, run_dir, "--on", "mpi", "--hostfile", hostfile(tmp_path, "n0", "n1"))
    agent = begin(ssh_cluster.nodes[0], line, log)
    with ending(agent):
        assert agent.wait(END_S) == 0, log.read_text()
    assert losses_of(run_dir) == reference


# ---- Slurm ----------------------------------------------------------------------------------------------------------


def submit(slurm: Slurm, corpus: Path, run_dir: Path, *arguments: object) -> str:
    """Launch on Slurm; give the number of the job."""
    line = launch(corpus, run_dir, "--on", "slurm", "--nodes", 2, "--processes-per-node", 1, *arguments)
    said = slurm.cluster.nodes[0].run(line, env=environment() | {"SLURM_CONF": str(slurm.config)}).stdout
    assert said.startswith("slurm job ")
    return said.split()[2].rstrip(";")


def log_of(run_dir: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in (run_dir / "launch").glob("slurm-*.log"))


def test_slurm_saves_at_its_signal_requeues_and_goes_on(slurm_cluster: Slurm, tmp_path, corpus, reference):
    run_dir = tmp_path / "run 'odd' $(id)"
    job = submit(slurm_cluster, corpus, run_dir)
    wait_until(reached(run_dir, 5), "step 5", END_S)
    slurm_cluster.run("scancel", "--batch", "--signal=USR2", job)
    try:
        wait_until(lambda: (run_dir / "COMPLETE").exists(), "the end", END_S)
    except TimeoutError as error:
        raise AssertionError(log_of(run_dir)) from error
    said = log_of(run_dir)
    assert "USR2: the run is asked to save and stop" in said and ": back into the queue" in said
    assert len(events_of(run_dir, "stop")) == 1 and len(events_of(run_dir, "resume")) == 1
    assert losses_of(run_dir) == reference
    slurm_cluster.wait_idle(2)
    assert [ranks_on(node) for node in slurm_cluster.cluster.nodes] == [[], []]


def test_slurm_preempts_for_a_job_of_higher_priority(slurm_cluster: Slurm, tmp_path, corpus, reference):
    run_dir = tmp_path / "run"
    submit(slurm_cluster, corpus, run_dir)
    wait_until(reached(run_dir, 3), "step 3", END_S)
    high = [
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    ]
    slurm_cluster.run(*high)
    try:
        wait_until(lambda: (run_dir / "COMPLETE").exists(), "the end", END_S)
    except TimeoutError as error:
        raise AssertionError(log_of(run_dir)) from error
    assert events_of(run_dir, "resume") and losses_of(run_dir) == reference
    slurm_cluster.wait_idle(2)
