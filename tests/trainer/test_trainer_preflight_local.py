"""What a rank can see of its own node: each fault is planted for real, and told with its fix."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest
from run_files import run_of

from basestone.data.prepare import prepare
from basestone.data.tokenizer import train_tokenizer
from basestone.trainer.places import DataPlaces, locate
from basestone.trainer.preflight import local
from basestone.trainer.preflight.gpus import gpu_facts, gpu_problems, memory_problems
from basestone.trainer.preflight.judge import GPUS
from basestone.trainer.preflight.local import Place

ALONE = Place(rank=0, world_size=2, local_rank=0, local_world_size=2, host="localhost")
ONE_OF_TWO = Place(rank=0, world_size=4, local_rank=0, local_world_size=2, host="localhost")


def test_a_host_name_that_is_loopback_is_refused_where_there_are_other_nodes():
    said = local.host_name_problem(ONE_OF_TWO, {})
    assert re.match(
        r"the host name localhost resolves to (127\.0\.0\.1|::1), where other nodes cannot connect: set `interface` in "
        r"the cluster file to one of .*, or mend /etc/hosts$",
        said,
    )
    assert local.host_name_problem(ALONE, {}) is None
    assert local.host_name_problem(ONE_OF_TWO, {"GLOO_SOCKET_IFNAME": "eth0"}) is None


def test_a_host_name_without_an_address_is_refused_and_an_address_is_not():
    nowhere = Place(0, 4, 0, 2, "no-such-host.invalid")
    assert "no-such-host.invalid has no address" in local.host_name_problem(nowhere, {})
    assert local.host_name_problem(Place(0, 4, 0, 2, "192.0.2.1"), {}) is None


def test_the_interfaces_that_there_are_are_named():
    said = local.host_name_problem(ONE_OF_TWO, {})
    for name, entries in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.family == socket.AF_INET for entry in entries):
            assert f"{name} (" in said
    assert "lo (" not in said


@pytest.mark.parametrize(
    ("variable", "value", "place", "told"),
    [
        ("GLOO_SOCKET_IFNAME", "ib7", ALONE, "GLOO_SOCKET_IFNAME=ib7: there is no such interface here"),
        ("GLOO_SOCKET_IFNAME", "l", ALONE, "GLOO_SOCKET_IFNAME=l: there is no such interface here"),
        ("GLOO_SOCKET_IFNAME", "lo", ALONE, None),
        ("GLOO_SOCKET_IFNAME", "lo", ONE_OF_TWO, "no other node can connect there"),
        ("NCCL_SOCKET_IFNAME", "l", ALONE, None),
        ("NCCL_SOCKET_IFNAME", "=l", ALONE, "NCCL_SOCKET_IFNAME==l: there is no such interface here"),
        ("NCCL_SOCKET_IFNAME", "=lo,ib7", ALONE, None),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", ONE_OF_TWO, None),
    ],
)
def test_interfaces_that_were_chosen_must_be_there(variable, value, place, told):
    said = local.interface_problem(place, {variable: value})
    assert said is None if told is None else told in said


def test_a_run_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    said = local.run_directory_problem(tmp_path / "file", ALONE, None)
    assert said.startswith(f"run directory {tmp_path / 'file'}: storage failed: ")
    assert local.run_directory_problem(tmp_path / "run", ALONE, None) is None
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_without_room_for_a_checkpoint_is_told_in_the_words_of_a_save(tmp_path):
    small = run_of().resolve(2, 200)
    large = run_of(model__hidden_size=1 << 20, model__num_layers=1000, model__head_dim=64).resolve(2, 200)
    assert local.run_directory_problem(tmp_path, ALONE, small) is None
    said = local.run_directory_problem(tmp_path, ALONE, large)
    assert re.match(r"a checkpoint needs [\d.]+ GB and [\d.]+ GB are free on the disk of ", said)
    (tmp_path / "checkpoints" / ".tmp-step_00000004-0123abcd").mkdir(parents=True)
    assert local.run_directory_problem(tmp_path, ALONE, large) is None, "the run clears that, then looks"


def test_little_shared_memory_is_told_where_nccl_needs_it(tmp_path):
    said = local.shared_memory_problem(ALONE, True, tmp_path / "absent")
    assert said.startswith(
        f"{tmp_path / 'absent'} has 0.00 GB free and NCCL needs 1.07 GB: give the container more"
    )
    assert local.shared_memory_problem(ALONE, False, tmp_path / "absent") is None
    assert local.shared_memory_problem(Place(0, 2, 0, 1, "n0"), True, tmp_path / "absent") is None


def test_a_low_limit_of_open_files_is_told():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, limits[1]))
    try:
        said = local.open_files_problem(Place(0, 64, 0, 8, "n0"))
        assert said.startswith("ulimit -n is 300, and a rank of 64 needs 448: raise it in ")
        assert local.open_files_problem(ALONE) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("place", ["fused_adam", "py311_cpu/deepspeed_shm_comm"])
def test_a_stale_lock_of_a_build_is_told_and_a_fresh_one_is_not(tmp_path, place):
    lock = tmp_path / place / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert local.stale_lock_problem(tmp_path) is None
    old_s = time.time() - 1800
    os.utime(lock, (old_s, old_s))
    assert local.stale_lock_problem(tmp_path) == (
        f"{lock} is 30 minutes old: a killed build left it, and DeepSpeed would wait for it for ever; remove it"
    )
    assert local.stale_lock_problem(tmp_path / "absent") is None


# ---- data -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path):
    """A run of real shards, its places, and the folder of the shards."""
    texts = [text for _, text in sorted(topics.items())][:20]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(tmp_path / "all.jsonl")], tmp_path / "shards", heldout_fraction=0.1, chunk_bytes=4096)
    train_tokenizer(iter(texts), tmp_path / "t.model", vocab_size=400)
    shards = tmp_path / "shards" / "train"
    run = run_of(data__train=str(shards), data__tokenizer=str(tmp_path / "t.model"))
    places = locate(run.data, run.reading, tmp_path / "cache")
    return run.resolve(2, 400), places, shards


def test_data_that_can_be_read_is_no_problem(data):
    resolved, places, _ = data
    assert local.data_problem(resolved, places) is None


def test_shards_that_are_gone_are_told_with_their_source(data):
    resolved, places, shards = data
    for shard in shards.glob("*.tar"):
        shard.unlink()
    said = local.data_problem(resolved, places)
    assert said.startswith("data of source train cannot be read: ") and ".tar" in said
    shutil.rmtree(shards)
    assert "data of source train cannot be read" in local.data_problem(resolved, places)


def test_damage_is_left_to_the_runs_quarantine(data):
    resolved, places, shards = data
    (shard, *_) = sorted(shards.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert isinstance(places, DataPlaces) and local.data_problem(resolved, places) is None


# ---- GPUs -------------------------------------------------------------------------------------------------------


def test_memory_errors_of_a_gpu_are_told():
    assert memory_problems(3, 0) == []
    (said,) = memory_problems(3, 2)
    assert said.startswith("GPU 3 has 2 uncorrected memory error(s): take the node out")


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there are GPUs")
def test_a_machine_without_gpus_has_no_problem_with_them():
    assert gpu_problems(ALONE) == []
    assert gpu_facts()[GPUS] == gpu_facts()["driver"] == "none"
