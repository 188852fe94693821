"""Phases of a step: what is in which, and what a device has not done yet."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from basestone.trainer.meters import phases as module
from basestone.trainer.meters.phases import Phases, ScheduleTimers


def test_spans_add_up_by_name():
    phases = Phases(on_cpu=True)
    for _ in range(3):
        with phases.device("forward"):
            time.sleep(0.01)
    with phases.host("data"):
        time.sleep(0.02)
    taken = phases.take()
    assert set(taken) == {"forward", "data"}
    assert taken["forward"] >= 0.03 and taken["data"] >= 0.02
    assert phases.take() == {}


def test_what_lies_in_a_host_phase_counts_to_it_alone():
    phases = Phases(on_cpu=True)
    timers = ScheduleTimers(phases)
    with phases.host("evaluate"):
        timers("forward-compute", log_level=2).start()
        with phases.host("data"), phases.device("optimizer"):
            time.sleep(0.01)
        timers("forward-compute").stop()
    assert set(phases.take()) == {"evaluate"}


def test_a_schedule_s_parts_become_phases():
    phases = Phases(on_cpu=True)
    timers = ScheduleTimers(phases)
    timers("forward-backward", log_level=1).start(barrier=True)
    for name in ("forward-recv", "forward-compute", "backward-compute", "backward-send-forward-recv"):
        timers(name, log_level=2).start()
        timers(name).stop()
    timers("forward-backward").stop()
    assert set(phases.take()) == {"forward", "backward", "bubble"}


@pytest.fixture
def device(monkeypatch):
    """A device whose queue gets as far as a test says; its events know nothing before."""
    queue = SimpleNamespace(recorded=0, done=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.recorded += 1
            self.at = queue.recorded

        def query(self):
            return self.at <= queue.done

        def elapsed_time(self, end):
            assert end.query(), "asked for what the device has not done"
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    return queue


def test_a_device_is_never_waited_for(device):
    phases = Phases(on_cpu=False)
    with phases.device("forward"):
        pass
    with phases.device("optimizer"):
        pass
    assert phases.take() == {}
    device.done = 2
    assert phases.take() == {"forward": 1.0}
    assert phases.take() == {}
    device.done = 4
    assert phases.take() == {"optimizer": 1.0}
