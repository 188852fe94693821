"""The last figures of a run for Prometheus to fetch: GET http://HOST:PORT/metrics.

Names are in base units, and counters end in `_total` (https://prometheus.io/docs/practices/naming/). What is not
known is absent. Counters go on over restarts, as the ledger does, and count work that was lost, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..meters.ledger import Ledger
from .sink import load_extra

GIB = 1 << 30
TERA = 1e12


class _Gauge(NamedTuple):
    name: str
    help: str
    unit: float = 1.0


# By the field of a step's record.
GAUGES = {
    "step": _Gauge("basestone_step", "Optimizer steps done"),
    "loss": _Gauge("basestone_loss", "Training loss of the last step, in nats"),
    "grad_norm": _Gauge("basestone_gradient_norm", "Global gradient norm before clipping"),
    "lr": _Gauge("basestone_learning_rate", "Learning rate of the last step"),
    "global_batch": _Gauge("basestone_global_batch_sequences", "Sequences in a step, over all ranks"),
    "sequence_length": _Gauge("basestone_sequence_length_tokens", "Tokens of a sequence, where lengths grow"),
    "tokens_per_s": _Gauge("basestone_tokens_per_second", "Tokens trained on a second, over all ranks"),
    "step_s": _Gauge("basestone_step_duration_seconds", "Mean time of a step"),
    "tflops_per_device": _Gauge("basestone_device_flops_per_second", "Model FLOP/s of a device", TERA),
    "mfu": _Gauge("basestone_mfu_ratio", "Model FLOP/s over the device's peak"),
    "hfu": _Gauge("basestone_hfu_ratio", "FLOP/s with recomputation over the device's peak"),
    "watts": _Gauge("basestone_power_watts", "Mean power of all metered devices"),
    "power_limit_w": _Gauge("basestone_power_limit_watts", "Lowest power limit of a GPU"),
    "joules_per_token": _Gauge("basestone_token_energy_joules", "Energy of a token"),
    "goodput": _Gauge("basestone_goodput_ratio", "Share of the wall time that trained the present weights"),
}
# By the field of an evaluation's record; each has the held-out set as label `name`.
HELDOUT = {
    "loss": _Gauge("basestone_heldout_loss", "Held-out loss, in nats"),
    "bits_per_byte": _Gauge("basestone_heldout_bits_per_byte", "Held-out bits per byte"),
}


@dataclass(frozen=True)
class _Seen:
    """What a scrape shows; replaced as a whole, for another thread reads it."""

    run_id: str
    record: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    heldout: dict[str, dict[str, Any]] = field(default_factory=dict)
    time_s: float = 0.0


class PrometheusSink:
    """Listens while the run lasts; rank 0 alone."""

    name = "Prometheus"

    def __init__(self, host: str, port: int, ledger: Ledger, currency: str) -> None:
        """Listen: a port that is taken is found before training.

        Raises:
            ConfigError: it is, the host cannot be listened on, or prometheus-client is not installed.
        """
        key = "meter.prometheus_port"
        client: Any = load_extra("prometheus_client", extra="prometheus", key=key)
        self._metrics: Any = load_extra("prometheus_client.core", extra="prometheus", key=key)
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        self._ledger, self._currency = ledger, currency
        self._seen: _Seen | None = None
        registry = client.CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = client.start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"{key} = {port}: cannot listen on {host}: {error.strerror}; take another port or host, or leave it out"
            ) from error

    def begin(self, run_id: str, step: int) -> str:
        """Begin to answer with figures."""
        self._seen = _Seen(run_id)
        return f"{self.name}: {self._url}"

    def step(self, record: dict[str, Any]) -> None:
        """Keep a step's figures, and the ledger as it is now."""
        assert self._seen is not None
        self._seen = replace(self._seen, record=record, ledger=copy.deepcopy(self._ledger), time_s=time.time())

    def evaluation(self, record: dict[str, Any]) -> None:
        """Keep a held-out set's figures."""
        assert self._seen is not None
        self._seen = replace(self._seen, heldout={**self._seen.heldout, record["name"]: record})

    def close(self) -> None:
        """Give the port back."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def collect(self) -> Iterator[Any]:
        """Give the families of a scrape; prometheus-client asks for them in a thread of its own."""
        if (seen := self._seen) is None:
            return
        yield self._gauge("basestone_run_info", "The run, by its id", [({"run_id": seen.run_id}, 1.0)])
        yield from self._heldout(seen)
        if seen.record:
            yield from self._gauges(seen)
            yield from self._counters(seen)

    def _heldout(self, seen: _Seen) -> Iterator[Any]:
        for key, gauge in HELDOUT.items():
            rows = [({"name": name}, record.get(key)) for name, record in sorted(seen.heldout.items())]
            yield from self._known(gauge.name, gauge.help, rows)

    def _gauges(self, seen: _Seen) -> Iterator[Any]:
        record = seen.record
        for key, gauge in GAUGES.items():
            yield from self._known(gauge.name, gauge.help, [({}, record.get(key))], gauge.unit)
        yield from self._known(
            "basestone_phase_duration_seconds",
            "Mean time of a step's phase",
            [({"phase": name}, seconds) for name, seconds in record.get("phase_s", {}).items()],
        )
        on_gpu = record.get("reserved_gib") is not None
        memory = {
            "allocated": record.get("memory_gib") if on_gpu else None,
            "reserved": record.get("reserved_gib"),
            "host": record.get("host_gib"),
        }
        yield from self._known(
            "basestone_memory_bytes",
            "Most that a rank held",
            [({"kind": kind}, value) for kind, value in memory.items()],
            GIB,
        )
        yield self._gauge(
            "basestone_last_record_timestamp_seconds", "When these figures came", [({}, seen.time_s)]
        )

    def _counters(self, seen: _Seen) -> Iterator[Any]:
        record, ledger = seen.record, seen.ledger
        source = {"source": ledger.joules_source}
        devices: list[tuple[dict[str, str], float | None]] = []
        for key, joules in ledger.joules_by_device.items():
            host, _, device = key.partition("/")
            devices.append(({"host": host, "device": device, **source}, joules))
        wasted_joules = None if ledger.joules is None else ledger.wasted_joules
        rows: list[tuple[str, str, list[tuple[dict[str, str], float | None]]]] = [
            ("basestone_attempts", "Starts of the run", [({}, ledger.attempts)]),
            ("basestone_tokens", "Tokens trained on", [({}, ledger.tokens)]),
            ("basestone_wasted_tokens", "Tokens whose work was lost", [({}, ledger.wasted_tokens)]),
            ("basestone_wall_seconds", "Time in which the run had processes", [({}, ledger.wall_s)]),
            ("basestone_energy_joules", "Metered energy", [(source, ledger.joules)]),
            ("basestone_wasted_energy_joules", "Energy whose work was lost", [({}, wasted_joules)]),
            ("basestone_device_energy_joules", "Metered energy of a device", devices),
            ("basestone_co2e_grams", "CO2 equivalents of the energy", [({}, record.get("g_co2e"))]),
            ("basestone_cost", "Energy and GPU hours", [({"currency": self._currency}, record.get("cost"))]),
            ("basestone_data_read_bytes", "Read from storage", [({}, record.get("data_bytes_read"))]),
            ("basestone_data_retries", "Reads tried again", [({}, record.get("data_retries"))]),
            ("basestone_data_bad_bytes", "Data in quarantine", [({}, record.get("data_bad_bytes"))]),
        ]
        for name, text, values in rows:
            yield from self._known(name, text, values, family=self._metrics.CounterMetricFamily)

    def _known(
        self,
        name: str,
        text: str,
        rows: list[tuple[dict[str, str], float | None]],
        unit: float = 1.0,
        family: Any = None,
    ) -> Iterator[Any]:
        """Give a family of the values that are known, or none."""
        known = [(labels, value * unit) for labels, value in rows if value is not None]
        if known:
            yield self._gauge(name, text, known, family)

    def _gauge(self, name: str, text: str, rows: list[tuple[dict[str, str], float]], family: Any = None) -> Any:
        made = (family or self._metrics.GaugeMetricFamily)(name, text, labels=list(rows[0][0]))
        for labels, value in rows:
            made.add_metric(list(labels.values()), value)
        return made
