"""The endpoint for Prometheus: scraped over HTTP and read by prometheus-client's own parser."""

from __future__ import annotations

import http.client
import socket
import sys
import threading

import pytest
from full_record import EVALUATION, LEDGER, STEP
from prometheus_client.parser import text_string_to_metric_families

from basestone.trainer.errors import ConfigError
from basestone.trainer.meters.ledger import Ledger
from basestone.trainer.sinks.prometheus import PrometheusSink


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def scraped(port: int, host: str = "127.0.0.1") -> dict[tuple[str, ...], float]:
    """Values by name and the values of its labels, in order of their names."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.status == 200 and answer.getheader("Content-Type", "").startswith("text/plain; version=")
    text = answer.read().decode()
    connection.close()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def sink():
    """Begin sinks that are closed at the end; gives a sink and its port."""
    opened = []

    def make(ledger: Ledger = LEDGER, host: str = "127.0.0.1") -> tuple[PrometheusSink, int]:
        port = free_port()
        opened.append(PrometheusSink(host, port, ledger, "EUR"))
        opened[-1].begin("r1", 0)
        return opened[-1], port

    yield make
    for one in opened:
        one.close()


def test_figures_are_in_base_units(sink):
    prometheus, port = sink()
    prometheus.evaluation(EVALUATION)
    prometheus.step(STEP)
    values = scraped(port)
    assert values.pop(("basestone_last_record_timestamp_seconds",)) > 1.7e9
    assert values == {
        ("basestone_run_info", "r1"): 1,
        ("basestone_step",): 7,
        ("basestone_loss",): 2.5,
        ("basestone_gradient_norm",): 0.75,
        ("basestone_learning_rate",): 3e-4,
        ("basestone_global_batch_sequences",): 8,
        ("basestone_sequence_length_tokens",): 128,
        ("basestone_tokens_per_second",): 1000.5,
        ("basestone_step_duration_seconds",): 0.5,
        ("basestone_device_flops_per_second",): 250e12,
        ("basestone_mfu_ratio",): 0.25,
        ("basestone_hfu_ratio",): 0.3,
        ("basestone_power_watts",): 1100.0,
        ("basestone_power_limit_watts",): 650.0,
        ("basestone_token_energy_joules",): 1.1,
        ("basestone_goodput_ratio",): 0.9,
        ("basestone_phase_duration_seconds", "data"): 0.1,
        ("basestone_phase_duration_seconds", "forward"): 0.4,
        ("basestone_memory_bytes", "allocated"): 2 * 2**30,
        ("basestone_memory_bytes", "reserved"): 3 * 2**30,
        ("basestone_memory_bytes", "host"): 2**29,
        ("basestone_heldout_loss", "topics"): 2.75,
        ("basestone_heldout_bits_per_byte", "topics"): 1.25,
        ("basestone_attempts_total",): 2,
        ("basestone_tokens_total",): 5000,
        ("basestone_wasted_tokens_total",): 500,
        ("basestone_wall_seconds_total",): 60.0,
        ("basestone_energy_joules_total", "nvml-counter"): 5500.0,
        ("basestone_wasted_energy_joules_total",): 100.0,
        ("basestone_device_energy_joules_total", "GPU-0", "a", "nvml-counter"): 5000.0,
        ("basestone_device_energy_joules_total", "rapl:package-0/dram", "b", "nvml-counter"): 500.0,
        ("basestone_co2e_grams_total",): 1.5,
        ("basestone_cost_total", "EUR"): 0.25,
        ("basestone_data_read_bytes_total",): 4096,
        ("basestone_data_retries_total",): 1,
        ("basestone_data_bad_bytes_total",): 0,
    }


def test_what_is_not_known_is_absent(sink):
    prometheus, port = sink(Ledger(attempts=1, tokens=10))
    assert set(scraped(port)) == {("basestone_run_info", "r1")}
    unknown = ("mfu", "hfu", "watts", "joules", "joules_per_token", "g_co2e", "cost", "power_limit_w")
    prometheus.step({**STEP, **dict.fromkeys((*unknown, "reserved_gib"))})
    names = {name for name, *_ in scraped(port)}
    for word in ("mfu", "hfu", "power", "energy", "co2e", "cost"):
        assert not [name for name in names if word in name]
    assert ("basestone_memory_bytes", "allocated") not in scraped(port), "of a CPU memory_gib is the host's"
    assert scraped(port)["basestone_memory_bytes", "host"] == 2**29


def test_a_scrape_shows_the_ledger_as_it_was_at_the_record(sink):
    ledger = Ledger(tokens=10)
    prometheus, port = sink(ledger)
    prometheus.step(STEP)
    ledger.tokens = 20
    assert scraped(port)["basestone_tokens_total",] == 10
    prometheus.step(STEP)
    assert scraped(port)["basestone_tokens_total",] == 20


def test_it_listens_where_it_was_told_and_nowhere_else(sink):
    _, port = sink()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    _, everywhere = sink(host="0.0.0.0")
    assert scraped(everywhere, "127.0.0.2")


def test_the_port_is_given_back():
    port = free_port()
    before = set(threading.enumerate())
    prometheus = PrometheusSink("127.0.0.1", port, LEDGER, "EUR")
    assert prometheus.begin("r1", 0) == f"Prometheus: http://127.0.0.1:{port}/metrics"
    prometheus.close()
    prometheus.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert set(threading.enumerate()) <= before
    early = PrometheusSink("127.0.0.1", port, LEDGER, "EUR")
    assert scraped(port) == {}, "no figures before it begins"
    early.close()


def test_a_port_that_is_taken_is_refused(sink):
    _, port = sink()
    message = (
        rf"meter.prometheus_port = {port}: cannot listen on 127.0.0.1: Address already in use; take another"
    )
    with pytest.raises(ConfigError, match=message):
        PrometheusSink("127.0.0.1", port, LEDGER, "EUR")


def test_a_host_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match=r"cannot listen on 192.0.2.1: Cannot assign requested address"):
        PrometheusSink("192.0.2.1", free_port(), LEDGER, "EUR")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"needs the package prometheus_client; pip install 'basestone\[prom"):
        PrometheusSink("127.0.0.1", free_port(), LEDGER, "EUR")
