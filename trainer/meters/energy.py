"""Energy in joules: the GPUs' counters, else their power samples, else RAPL, else watts the user gave, else none.

What is not known is never 0: a device without a reading is left out, and with nothing to read the source is
`none` and `read()` is empty. RAPL: /sys/class/powercap counts microjoules and wraps.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from .nvml import MILLI, Gpu, Nvml, NvmlError

Source = Literal["nvml-counter", "nvml-samples", "rapl", "user-watts", "none"]
MEANING: dict[str, str] = {  # the best source first
    "nvml-counter": "measured: GPU boards only, by their energy counters; not CPUs, network, fans or power supplies",
    "nvml-samples": "measured: GPU boards only, by samples of their power; not CPUs, network, fans or power supplies",
    "rapl": "measured: CPU packages and memory, by RAPL; not GPUs, disks, network, fans or power supplies",
    "user-watts": "estimated: the watts of a host given in meter.watts, times the time",
    "none": "nothing was metered",
}

SAMPLE_INTERVAL_S = 0.1
RAPL_INTERVAL_S = 60.0  # a package at 350 W wraps after 749 s, and a save or an evaluation may block for longer
DEAD_AFTER_S = 5.0  # a counter that stood still for so long under load counts nothing
MAX_PACKAGE_W = 1000.0  # tells a wrap from a reset
BOUND_SLACK = 1.5
MICRO = 1e6  # RAPL counts microjoules


class Meter:
    """Joules of one device since construction."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start at 0 joules; `clock` gives seconds."""
        self.joules = 0.0
        self._clock = clock
        self._start_s = clock()

    def update(self) -> None:
        """Count up to now."""
        raise NotImplementedError

    @property
    def is_known(self) -> bool:
        """Tell whether the device has shown any energy, without which it says nothing."""
        return self.joules > 0

    @property
    def is_dead(self) -> bool:
        """Tell whether it showed none for as long as a live one never does."""
        return not self.is_known and self._clock() - self._start_s >= DEAD_AFTER_S


class CounterMeter(Meter):
    """Turn a hardware counter into joules; invent none and subtract none."""

    def __init__(
        self,
        read: Callable[[], int],
        unit_j: float,
        clock: Callable[[], float],
        *,
        wrap: int | None = None,
        max_w: float = MAX_PACKAGE_W,
    ) -> None:
        """Take the first reading.

        `read` gives the counter in units of `unit_j` joules and raises where it cannot; `wrap` is the value at
        which it starts again from 0, `max_w` what the device can draw at most.
        """
        super().__init__(clock)
        self._read, self._unit_j = read, unit_j
        self._wrap, self._max_w = wrap, max_w
        self._last: int | None = None
        self._last_s = self._start_s
        self.update()

    def update(self) -> None:
        """Add what was used since the last good reading; a failed one leaves it to the next to cover the gap."""
        try:
            value = self._read()
        except Exception:  # whatever the driver raises: the reading is missing, nothing else
            return
        now_s = self._clock()
        if self._last is not None:
            self.joules += self._used(value, self._last, now_s - self._last_s) * self._unit_j
        self._last, self._last_s = value, now_s

    def _used(self, value: int, last: int, elapsed_s: float) -> int:
        if value >= last:
            return value - last
        if self._wrap is not None:
            wrapped = value - last + self._wrap
            if 0 <= wrapped * self._unit_j <= self._max_w * elapsed_s * BOUND_SLACK:
                return wrapped
        return value  # the counter was reset: count what it shows since


class PowerMeter(Meter):
    """Integrate power over time by the trapezoid rule, for devices that have no counter."""

    def __init__(self, read_w: Callable[[], float], clock: Callable[[], float]) -> None:
        """Take the first sample; `read_w` gives watts and raises where it cannot."""
        super().__init__(clock)
        self._read_w = read_w
        self._last: tuple[float, float] | None = None
        self.update()

    def update(self) -> None:
        """Take a sample; a failed one leaves it to the next to cover the gap."""
        try:
            watts = self._read_w()
        except Exception:  # whatever the driver raises: the sample is missing, nothing else
            return
        now_s = self._clock()
        if self._last is not None:
            last_s, last_w = self._last
            self.joules += (watts + last_w) / 2 * (now_s - last_s)
        self._last = now_s, watts


class WattsMeter(Meter):
    """Multiply the watts that the user gave by time."""

    def __init__(self, watts: float, start_s: float, clock: Callable[[], float]) -> None:
        """Count from `start_s` on the clock."""
        super().__init__(clock)
        self._watts, self._start_s = watts, start_s

    def update(self) -> None:
        """Count up to now."""
        self.joules = self._watts * (self._clock() - self._start_s)


class EnergyMeter:
    """Give the joules used since construction, by device, with the kind of their source.

    A GPU's figure is that of the whole board, whatever share of it the process has.
    """

    def __init__(
        self,
        *,
        gpus: Sequence[str] = (),
        watts: float | None = None,
        age_s: float = 0.0,
        powercap: Path = Path("/sys/class/powercap"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the best source there is.

        Args:
            gpus: NVML UUIDs (of a device or of a MIG slice) or NVML indices, as strings.
            watts: what this host draws while it trains; the last resort.
            age_s: how long it has done so already, which only given watts can tell.
            powercap: where Linux shows the RAPL counters.
            clock: seconds that never go back.
        """
        self._gpus, self._watts, self._powercap, self._clock = tuple(gpus), watts, powercap, clock
        self._host = socket.gethostname()
        self._start_s = clock() - age_s
        self._meters: dict[str, Meter] = {}
        self._power_readers: dict[str, Callable[[], float]] = {}
        self._notes: dict[str, None] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Nvml | None = None
        self._boards: dict[str, Gpu] = {}
        self._openers = iter((self._open_gpus, self._open_rapl, self._open_watts))
        self._open_next()

    @property
    def source(self) -> Source:
        """Name the kind of the figures; the weaker kind where GPUs differ."""
        meters = tuple(self._meters.items())
        if not meters:
            return "none"
        if any(isinstance(meter, PowerMeter) for _, meter in meters):
            return "nvml-samples"
        if any(isinstance(meter, WattsMeter) for _, meter in meters):
            return "user-watts"
        return "rapl" if any("/rapl:" in key for key, _ in meters) else "nvml-counter"

    @property
    def note(self) -> str:
        """Say in one line what could not be read and why; "" where there is nothing to say."""
        return "; ".join(tuple(self._notes))

    def read(self) -> dict[str, float]:
        """Give cumulative joules by `<host>/<device>`, so that ranks of one host can be counted once.

        A device that has shown no energy yet is left out.
        """
        with self._lock:
            self._update()
            return {key: meter.joules for key, meter in self._meters.items() if meter.is_known}

    def power_limits_w(self) -> dict[str, float]:
        """Give what each GPU may draw; one that does not say is left out."""
        limits = {}
        for key, gpu in self._boards.items():
            with suppress(NvmlError):
                limits[key] = gpu.power_limit_w()
        return limits

    def close(self) -> None:
        """Stop sampling and let NVML go; a second call does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._boards = {}
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def _update(self) -> None:
        for meter in self._meters.values():
            meter.update()
        for key in [key for key, meter in self._meters.items() if meter.is_dead]:
            dead = self._meters.pop(key)
            self._notes[f"{key}: its reading stands still"] = None
            if isinstance(dead, CounterMeter) and key in self._power_readers:
                self._add_power_meter(key)
        if not self._meters:
            self._open_next()

    def _open_next(self) -> None:
        """Go down the list to the first source that gives a reading."""
        for opener in self._openers:
            opener()
            if self._meters:
                return

    def _open_gpus(self) -> None:
        if not self._gpus:
            self._notes["no GPU"] = None
            return
        try:
            self._nvml = Nvml()
        except NvmlError as error:
            self._notes[f"NVML: {error}"] = None
            return
        for name in self._gpus:
            try:
                gpu = self._nvml.gpu(name)
            except NvmlError as error:
                self._notes[f"GPU {name}: {error}"] = None
                continue
            self._open_gpu(f"{self._host}/{gpu.uuid}", gpu)

    def _open_gpu(self, key: str, gpu: Gpu) -> None:
        self._boards[key] = gpu
        try:
            gpu.power_w()
            self._power_readers[key] = gpu.power_w
        except NvmlError as error:
            without_power = str(error)
        try:
            gpu.energy_mj()
        except NvmlError as error:
            self._notes[f"{key}: no energy counter: {error}"] = None
            if key in self._power_readers:
                self._add_power_meter(key)
            else:
                self._notes[f"{key}: no power reading: {without_power}"] = None
            return
        self._meters[key] = CounterMeter(gpu.energy_mj, 1 / MILLI, self._clock)

    def _add_power_meter(self, key: str) -> None:
        self._meters[key] = PowerMeter(self._power_readers[key], self._clock)
        self._start_thread(SAMPLE_INTERVAL_S)

    def _open_rapl(self) -> None:
        if not (zones := list(_rapl_zones(self._powercap))):
            self._notes[f"no RAPL counter in {self._powercap}"] = None
        for key, zone in zones:
            try:
                wrap = _read_int(zone / "max_energy_range_uj")
                _read_int(zone / "energy_uj")
            except (OSError, ValueError) as error:
                self._notes[f"RAPL: {error} (give the user's group the right to read {zone})"] = None
                continue
            self._meters[f"{self._host}/rapl:{key}"] = CounterMeter(
                partial(_read_int, zone / "energy_uj"), 1 / MICRO, self._clock, wrap=wrap
            )
        if self._meters:
            self._start_thread(RAPL_INTERVAL_S)

    def _open_watts(self) -> None:
        if self._watts is not None:
            self._meters[f"{self._host}/user-watts"] = WattsMeter(self._watts, self._start_s, self._clock)

    def _start_thread(self, interval_s: float) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._keep_sampling, args=(interval_s,), name="energy-samples", daemon=True
            )
            self._thread.start()

    def _keep_sampling(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            with self._lock:
                self._update()


def _rapl_zones(powercap: Path) -> Iterator[tuple[str, Path]]:
    """List packages and their memory: cores and the platform are parts or wholes of these, not more energy."""
    for package in sorted(powercap.glob("intel-rapl:*")):
        if package.name.count(":") != 1 or not (name := _zone_name(package)).startswith("package"):
            continue
        yield name, package
        for part in sorted(powercap.glob(f"{package.name}:*")):
            if _zone_name(part) == "dram":
                yield f"{name}/dram", part


def _read_int(path: Path) -> int:
    return int(path.read_text())


def _zone_name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""
