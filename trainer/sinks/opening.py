"""Which sinks a run has."""

from __future__ import annotations

from ..config import ResolvedRun
from ..rundir import RunDirectory
from .prometheus import PrometheusSink
from .sink import Sink
from .tensorboard import TensorBoardSink
from .weights_and_biases import WandbSink


def open_sinks(resolved: ResolvedRun, directory: RunDirectory) -> list[Sink]:
    """Make the sinks that [meter] asks for; they begin later.

    Raises:
        ConfigError: a package is not installed, or the port is taken.
    """
    meter, sinks = resolved.run.meter, list[Sink]()
    if meter.tensorboard:
        sinks.append(TensorBoardSink(directory.path))
    if meter.wandb_project is not None:
        config = resolved.run.model_dump(mode="json")
        sinks.append(WandbSink(meter.wandb_project, directory.path, config, resolved.steps))
    if meter.prometheus_port is not None:  # the last one: it listens from now on
        sinks.append(
            PrometheusSink(meter.prometheus_host, meter.prometheus_port, directory.ledger, meter.currency)
        )
    return sinks
