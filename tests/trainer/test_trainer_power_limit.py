"""Power limits over a fake NVML: taken, refused, and given back."""

from __future__ import annotations

from collections.abc import Iterator

import pynvml
import pytest
from fake_nvml import NO_PERMISSION, Clock, FakeNvml, install

from basestone.trainer.errors import ConfigError
from basestone.trainer.meters.energy import EnergyMeter
from basestone.trainer.meters.power_limit import PowerLimit


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    library = FakeNvml(Clock(), [300.0, 410.0])
    with monkeypatch.context() as patch:
        install(library, patch)
        yield library
    pynvml._nvmlGetFunctionPointer_cache.clear()


def test_a_limit_is_set_and_given_back(nvml):
    nvml.limits_mw[1] = 650_000
    limit = PowerLimit(["GPU-0", "GPU-1"], 450)
    assert nvml.limits_mw == [700_000, 650_000], "nothing changes yet"
    assert limit.set() == "power limit 450 W, was 650, 700 W (after a kill: nvidia-smi -pl gives it back)"
    assert nvml.limits_mw == [450_000, 450_000]
    limit.close()
    assert nvml.limits_mw == [700_000, 650_000]
    assert nvml.num_shutdowns == 1


@pytest.mark.parametrize("watts", [199.0, 701.0])
def test_a_limit_that_no_gpu_takes_is_refused(nvml, watts):
    with pytest.raises(ConfigError, match=rf"power_limit_w = {watts:g}: GPU-0 takes 200 to 700 W"):
        PowerLimit(["GPU-0"], watts)
    assert nvml.num_shutdowns == 1


def test_a_limit_that_may_not_be_set_is_refused_with_what_to_do(nvml):
    nvml.errors["set limit", 0] = NO_PERMISSION
    with pytest.raises(ConfigError, match=r"Insufficient Permissions; run as root, or .* nvidia-smi -pl 450"):
        PowerLimit(["GPU-0"], 450)


def test_without_a_driver_there_is_no_limit(nvml):
    nvml.errors["init", 0] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    with pytest.raises(ConfigError, match=r"no GPU's limit can be set: NVML"):
        PowerLimit(["GPU-0"], 450)


def test_a_limit_that_stays_is_said(nvml, caplog):
    limit = PowerLimit(["GPU-0"], 450)
    limit.set()
    nvml.errors["set limit", 0] = NO_PERMISSION
    limit.close()
    assert "GPU-0 keeps a power limit of 450 W: Insufficient Permissions" in caplog.text


def test_the_meter_reads_the_limits_that_are_said(nvml, tmp_path):
    nvml.errors["limit", 1] = NO_PERMISSION
    meter = EnergyMeter(gpus=["GPU-0", "GPU-1"], powercap=tmp_path, clock=nvml.clock)
    assert [*meter.power_limits_w().values()] == [700.0]
    meter.close()
    assert meter.power_limits_w() == {}
