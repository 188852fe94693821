"""The environment as the command line reads it and hands it on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from basestone.launch import environ
from basestone.trainer.errors import ConfigError

LAUNCHER = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "BASESTONE_RENDEZVOUS",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out what a launcher, a scheduler or this test run has set."""
    for name in list(os.environ):
        if name in LAUNCHER | {"OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"} or name.startswith(
            "SLURM_"
        ):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("given", "inside"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
    ],
)
def test_a_launcher_is_known_by_rank_and_world_size(monkeypatch, given, inside):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert environ.inside_launcher() is inside


def slurm(monkeypatch: pytest.MonkeyPatch, **values: str) -> dict[str, str]:
    """Adopt a task of srun; give the launcher's names afterwards."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in LAUNCHER - set(values):
        monkeypatch.setenv(name, "")  # so that what is set below is undone after the test
        monkeypatch.delenv(name)
    environ.adopt_srun()
    return {name: os.environ[name] for name in LAUNCHER if name in os.environ}


TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "node0"}


def test_srun_gives_rank_and_size_and_all_tasks_the_same_port(monkeypatch):
    found = slurm(monkeypatch, **TASK, SLURM_JOB_ID="1234567")
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": str(20000 + 1234567 % 20000),
    }
    assert environ.inside_launcher()


def test_srun_does_not_overrule_what_is_given(monkeypatch):
    found = slurm(monkeypatch, **TASK, MASTER_PORT="29500", RANK="2")
    assert (found["RANK"], found["MASTER_PORT"]) == ("2", "29500")


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR"])
def test_half_of_srun_is_no_launcher(monkeypatch, missing):
    found = slurm(monkeypatch, **{name: value for name, value in TASK.items() if name != missing})
    assert "RANK" not in found and not environ.inside_launcher()


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1, 3", 3), ("GPU-1f2e,GPU-77", 2)]
)
def test_visible_gpus_are_counted(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environ.num_gpus() == count


def test_a_worker_knows_its_place(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SOMETHING", "else")
    made = environ.worker_environment(3, 4, tmp_path / "meet")
    wanted = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "4",
        "BASESTONE_RENDEZVOUS": str(tmp_path / "meet"),
        "DS_ACCELERATOR": "cpu",
        "SOMETHING": "else",
    }
    assert wanted.items() <= made.items()
    assert int(made["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 4)
    assert "RANK" not in os.environ, "only the worker's environment changes"


def test_a_worker_beside_gpus_keeps_deepspeeds_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "DS_ACCELERATOR" not in environ.worker_environment(0, 2, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "OMP_NUM_THREADS",
        "GLOO_SOCKET_IFNAME",
        "TOKENIZERS_PARALLELISM",
        "DS_ACCELERATOR",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
    ],
)
def test_what_the_user_has_set_is_kept(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environ.worker_environment(0, 2, tmp_path)[name] == "mine"


def test_there_is_at_least_one_thread(tmp_path):
    assert environ.worker_environment(0, 10_000, tmp_path)["OMP_NUM_THREADS"] == "1"


def test_a_child_command_is_no_worker(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "BASESTONE_RENDEZVOUS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SOMETHING", "else")
    made = environ.child_environment()
    assert not made.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "BASESTONE_RENDEZVOUS"}
    assert made["SOMETHING"] == "else" and made["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("given", "place"), [("/caches", "/caches/basestone"), ("", "/home/me/.cache/basestone")]
)
def test_the_cache_is_where_the_desktop_says(monkeypatch, given, place):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/home/me")
    assert environ.cache_dir() == Path(place)


def test_tasks_of_srun_that_could_not_meet_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(
        ConfigError, match=r"one of 4 tasks of srun, and MASTER_ADDR .*basestone launch --on slurm"
    ):
        environ.adopt_srun()
    monkeypatch.setenv("MASTER_ADDR", "n0")
    environ.adopt_srun()


RANKS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    "hosts": {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
    "mpi": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
}


@pytest.mark.parametrize("backend", RANKS)
def test_a_rank_knows_itself_by_its_launchers_names(monkeypatch, backend):
    for name, value in RANKS[backend].items():
        monkeypatch.setenv(name, value)
    identity = environ.rank_of_launcher(backend)
    assert identity == environ.RankIdentity(3, 4, 1, 2)
    made = environ.rank_environment(identity, {"A": "b"}, "eth7")
    assert (made["RANK"], made["WORLD_SIZE"], made["LOCAL_RANK"], made["LOCAL_WORLD_SIZE"]) == (
        "3",
        "4",
        "1",
        "2",
    )
    assert (made["A"], made["GLOO_SOCKET_IFNAME"], made["NCCL_SOCKET_IFNAME"]) == ("b", "eth7", "eth7")


def test_mpich_is_known_too(monkeypatch):
    for name, value in {
        "PMI_RANK": "0",
        "PMI_SIZE": "2",
        "MPI_LOCALRANKID": "0",
        "MPI_LOCALNRANKS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert environ.rank_of_launcher("mpi") == environ.RankIdentity(0, 2, 0, 1)


def test_a_process_that_no_launcher_numbered_is_refused(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"no rank of mpi: the environment lacks OMPI_COMM_WORLD_RANK, .* or PMI_RANK"
    ):
        environ.rank_of_launcher("mpi")
