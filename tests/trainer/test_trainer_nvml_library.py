"""A compiled driver library under the real nvidia-ml-py, in processes of their own: types, codes and large counters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "nvml_library.c"
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the library cannot be built")

# A rank that meters one GPU: it answers each name on its input with what it reads then.
RANK = """
import json, sys
from basestone.trainer.meters.energy import EnergyMeter
from basestone.trainer.meters.nvml import NvmlError
from basestone.trainer.meters.power_limit import PowerLimit

meter = EnergyMeter(gpus=sys.argv[1:])
limit = gpu = None
for line in sys.stdin:
    if line.strip() == "limit":
        limit = PowerLimit(sys.argv[1:], 400.0)
        limit.set()
        gpu = meter._nvml.gpu(sys.argv[1])
    elif line.strip() == "unlimit":
        limit.close()
    said = {"own_w": gpu.own_limit_w()} if gpu else {}
    said |= {"joules": meter.read(), "limits_w": meter.power_limits_w(), "source": meter.source, "note": meter.note}
    print(json.dumps(said), flush=True)
meter.close()
"""


class Rank:
    """A process that meters."""

    def __init__(self, library: Path, clock: Path, *gpus: str) -> None:
        found = {"LD_LIBRARY_PATH": str(library.parent), "NVML_CLOCK": str(clock)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, *gpus],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | found,
        )
        self.ask("begin")

    def ask(self, word: str):
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0
        self.process.stdout.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("driver") / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", built, SOURCE], check=True)
    return built


def test_two_processes_read_one_board_and_its_large_counter(library, tmp_path):
    clock = tmp_path / "clock"
    clock.write_text("1000.0")
    ranks = [Rank(library, clock, "GPU-0"), Rank(library, clock, "MIG-0")]
    try:
        clock.write_text("1010.0")
        said = [rank.ask("read") for rank in ranks]
        assert [one["source"] for one in said] == ["nvml-counter", "nvml-counter"]
        assert [list(one["joules"].values()) for one in said] == [[3000.0], [3000.0]], "300 W for 10 s"
        assert said[0]["joules"].keys() == said[1]["joules"].keys(), "a slice is counted as its board"
        clock.write_text("2.0")
        assert [list(rank.ask("read")["joules"].values()) for rank in ranks] == [
            [5_003_600.0],
            [5_003_600.0],
        ], "loaded anew: what the counter shows since, and what came before it"
    finally:
        for rank in ranks:
            rank.close()


def test_a_power_limit_reaches_the_board_and_goes_again(library, tmp_path):
    clock = tmp_path / "clock"
    clock.write_text("0")
    rank = Rank(library, clock, "GPU-0")
    try:
        assert list(rank.ask("read")["limits_w"].values()) == [650.0], "what holds, of all limits"
        assert list(rank.ask("limit")["limits_w"].values()) == [400.0]
        said = rank.ask("unlimit")
        assert list(said["limits_w"].values()) == [650.0] and said["own_w"] == 700.0
    finally:
        rank.close()


def test_boards_that_refuse_say_so_in_the_drivers_words(library, tmp_path):
    clock = tmp_path / "clock"
    clock.write_text("0")
    rank = Rank(library, clock, "GPU-1", "GPU-2", "GPU-7")
    try:
        said = rank.ask("read")
    finally:
        rank.close()
    assert said["source"] == "nvml-samples", "the board without a counter is sampled"
    assert "GPU-1: no energy counter: Not Supported" in said["note"]
    assert "GPU-2: no power reading: Insufficient Permissions" in said["note"]
    assert "GPU GPU-7: Not Found" in said["note"]
