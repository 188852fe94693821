"""The energy meter over a fake NVML (real nvidia-ml-py on a library in Python) and RAPL files in a directory."""

import re
import socket
import threading
import time

import pynvml
import pytest
from fake_nvml import NOT_SUPPORTED, Clock, FakeNvml, install

from basestone.trainer.meters.energy import CounterMeter, EnergyMeter, PowerMeter

HOST = socket.gethostname()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def nvml(clock, monkeypatch):
    """Two GPUs of 300 W and 410 W under real pynvml."""
    library = FakeNvml(clock, [300.0, 410.0])
    with monkeypatch.context() as patch:
        install(library, patch)
        yield library
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def meter(clock, tmp_path):
    """Open meters that are closed at the end."""
    opened = []

    def make(**changes):
        opened.append(EnergyMeter(**{"clock": clock, "powercap": tmp_path, **changes}))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def make_zone(powercap, zone, name, value, wrap=262_143_328_850):
    path = powercap / zone
    path.mkdir()
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{value}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    return path / "energy_uj"


def test_counters_give_exact_joules_by_uuid(nvml, meter, clock):
    energy = meter(gpus=["0", "GPU-1"])
    assert energy.source == "nvml-counter"
    assert energy.read() == {}  # nothing used yet is not 0
    clock.now_s += 4
    assert energy.read() == pytest.approx({f"{HOST}/GPU-0": 1200.0, f"{HOST}/GPU-1": 1640.0})
    clock.now_s += 1
    assert energy.read()[f"{HOST}/GPU-0"] == pytest.approx(1500.0)
    assert energy.note == ""


def test_one_board_named_twice_counts_once(nvml, meter, clock):
    energy = meter(gpus=["0", "GPU-0", "MIG-0"])
    clock.now_s += 2
    assert energy.read() == pytest.approx({f"{HOST}/GPU-0": 600.0})


def test_a_mig_slice_reads_its_board(nvml, meter, clock):
    energy = meter(gpus=["MIG-1"])
    clock.now_s += 2
    assert energy.read() == pytest.approx({f"{HOST}/GPU-1": 820.0})


def test_without_a_counter_power_is_sampled(nvml, meter, clock):
    nvml.errors["energy", 0] = NOT_SUPPORTED
    energy = meter(gpus=["0"])
    assert energy.source == "nvml-samples"
    clock.now_s += 4
    assert energy.read() == pytest.approx({f"{HOST}/GPU-0": 1200.0})
    assert "no energy counter: Not Supported" in energy.note


def test_gpus_of_both_kinds_get_the_weaker_label(nvml, meter, clock):
    nvml.errors["energy", 1] = NOT_SUPPORTED
    energy = meter(gpus=["0", "1"])
    clock.now_s += 4
    assert energy.source == "nvml-samples"
    assert energy.read() == pytest.approx({f"{HOST}/GPU-0": 1200.0, f"{HOST}/GPU-1": 1640.0})


def test_power_is_sampled_in_the_background(nvml, tmp_path):
    """Real time: a burst between two reads is seen, which two readings alone would miss."""
    nvml.errors["energy", 0] = NOT_SUPPORTED
    nvml.watts[0] = 100.0
    energy = EnergyMeter(gpus=["0"], powercap=tmp_path)
    try:
        time.sleep(0.25)
        nvml.watts[0] = 1100.0
        time.sleep(0.5)
        nvml.watts[0] = 100.0
        time.sleep(0.25)
        assert energy.read()[f"{HOST}/GPU-0"] > 300  # without sampling: some 100
    finally:
        energy.close()
    assert "energy-samples" not in {thread.name for thread in threading.enumerate()}


def test_no_thread_where_counters_do(nvml, meter):
    meter(gpus=["0"])
    assert "energy-samples" not in {thread.name for thread in threading.enumerate()}


def test_a_failed_read_is_covered_by_the_next(nvml, meter, clock):
    energy = meter(gpus=["0"])
    clock.now_s += 1
    assert energy.read()[f"{HOST}/GPU-0"] == pytest.approx(300)
    nvml.errors["energy", 0] = pynvml.NVML_ERROR_GPU_IS_LOST
    clock.now_s += 1
    assert energy.read()[f"{HOST}/GPU-0"] == pytest.approx(300)
    del nvml.errors["energy", 0]
    clock.now_s += 1
    assert energy.read()[f"{HOST}/GPU-0"] == pytest.approx(900)


def test_a_first_read_that_fails_makes_no_delta_of_the_whole_counter(clock):
    readings = iter([OSError("not yet"), 438_180_000, 438_480_000])

    def read():
        value = next(readings)
        if isinstance(value, Exception):
            raise value
        return value

    counter = CounterMeter(read, 1e-3, clock)
    counter.update()
    assert counter.joules == 0
    counter.update()
    assert counter.joules == pytest.approx(300)


def test_a_reset_is_never_negative(nvml, meter, clock):
    energy = meter(gpus=["0"])
    clock.now_s += 10
    assert energy.read()[f"{HOST}/GPU-0"] == pytest.approx(3000)
    nvml.boot_s[0] = clock.now_s + 1
    clock.now_s += 2
    assert energy.read()[f"{HOST}/GPU-0"] == pytest.approx(3300)  # what the counter shows since


def test_a_dead_counter_gives_way_to_samples(nvml, meter, clock):
    nvml.frozen[0] = True
    energy = meter(gpus=["0"])
    clock.now_s += 4
    assert energy.read() == {}
    assert energy.source == "nvml-counter"
    clock.now_s += 2
    assert energy.read() == {}
    assert energy.source == "nvml-samples"
    clock.now_s += 3
    assert energy.read() == pytest.approx({f"{HOST}/GPU-0": 900.0})
    assert "stands still" in energy.note


def test_dead_counter_and_dead_power_end_in_none(nvml, meter, clock):
    nvml.frozen[0] = True
    nvml.watts[0] = 0.0
    energy = meter(gpus=["0"])
    for _ in range(3):
        clock.now_s += 6
        assert energy.read() == {}
    assert energy.source == "none"


@pytest.mark.parametrize("code", [NOT_SUPPORTED, 4])
def test_a_gpu_without_any_reading_is_left_out(nvml, meter, clock, code):
    nvml.errors["energy", 0] = nvml.errors["power", 0] = code
    energy = meter(gpus=["0", "1"])
    clock.now_s += 1
    assert set(energy.read()) == {f"{HOST}/GPU-1"}
    assert f"{HOST}/GPU-0: no power reading" in energy.note


def test_an_unknown_gpu_is_noted(nvml, meter, clock):
    energy = meter(gpus=["7"], watts=100.0)
    clock.now_s += 1
    assert energy.source == "user-watts"
    assert "GPU 7:" in energy.note


def test_no_driver_falls_to_watts(nvml, meter, clock):
    nvml.errors["init", 0] = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    energy = meter(gpus=["0"], watts=250.0)
    clock.now_s += 8
    assert energy.source == "user-watts"
    assert energy.read() == {f"{HOST}/user-watts": 2000.0}
    assert energy.note.startswith("NVML:")


def test_nothing_is_none_and_not_zero(meter, clock):
    energy = meter()
    clock.now_s += 100
    assert energy.read() == {}
    assert energy.source == "none"


def test_rapl_counts_packages_and_their_memory_only(meter, clock, tmp_path):
    files = {
        zone: make_zone(tmp_path, zone, name, 1_000_000)
        for zone, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "dram"),
            ("intel-rapl:0:1", "core"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        )
    }
    energy = meter(watts=77.0)
    assert energy.source == "rapl"
    clock.now_s += 2
    for file in files.values():
        file.write_text("41000000\n")
    files["intel-rapl:0:1"].write_text("31000000\n")
    assert energy.read() == pytest.approx(
        {
            f"{HOST}/rapl:package-0": 40.0,
            f"{HOST}/rapl:package-0/dram": 40.0,
            f"{HOST}/rapl:package-1": 40.0,
        }
    )


def test_rapl_wraps(meter, clock, tmp_path):
    wrap = 262_143_328_850
    file = make_zone(tmp_path, "intel-rapl:0", "package-0", wrap - 50_000_000, wrap)
    energy = meter()
    clock.now_s += 1
    file.write_text(str(wrap - 10_000_000))
    assert energy.read()[f"{HOST}/rapl:package-0"] == pytest.approx(40)
    clock.now_s += 1
    file.write_text("40000000")
    assert energy.read()[f"{HOST}/rapl:package-0"] == pytest.approx(90)


def test_a_rapl_reset_is_not_taken_for_a_wrap(meter, clock, tmp_path):
    """Going back from 6 J to 1 J within a second as a wrap would be 262 kW."""
    file = make_zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    energy = meter()
    for value, expected_j in ((6_000_000, 1.0), (1_000_000, 2.0), (3_000_000, 4.0)):
        clock.now_s += 1
        file.write_text(str(value))
        assert energy.read()[f"{HOST}/rapl:package-0"] == pytest.approx(expected_j)


def test_an_unreadable_rapl_sample_loses_nothing(meter, clock, tmp_path):
    file = make_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000_000)
    energy = meter()
    for text, expected_j in (("1500000000", 500), ("", 500), ("2000000000", 1000)):
        clock.now_s += 5
        file.write_text(text)
        assert energy.read()[f"{HOST}/rapl:package-0"] == pytest.approx(expected_j)


def test_a_dead_rapl_counter_gives_way_to_watts_from_the_start(meter, clock, tmp_path):
    make_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    energy = meter(watts=10.0)
    clock.now_s += 6
    energy.read()
    assert energy.source == "user-watts"
    clock.now_s += 4
    assert energy.read() == {f"{HOST}/user-watts": 100.0}


def test_an_unreadable_rapl_file_is_noted(meter, tmp_path):
    file = make_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    file.unlink()
    energy = meter()
    assert energy.source == "none"
    assert re.match(
        r"no GPU; RAPL: .*energy_uj.*give the user's group the right to read .*intel-rapl:0", energy.note
    )


def test_close_lets_nvml_go_once(nvml, meter):
    energy = meter(gpus=["0"])
    energy.close()
    energy.close()
    assert nvml.num_shutdowns == 1


def test_power_is_integrated_by_trapezoids(clock):
    watts = [100.0]
    power = PowerMeter(lambda: watts[0], clock)
    clock.now_s += 2
    watts[0] = 300.0
    power.update()
    assert power.joules == pytest.approx(400)
