"""Which sinks a run has."""

from __future__ import annotations

from ..config import ResolvedRun
from ..rundir import RunDirectory
from .sink import Sink
from .tensorboard import TensorBoardSink


def open_sinks(resolved: ResolvedRun, directory: RunDirectory) -> list[Sink]:
    """Make the sinks that [meter] asks for; they begin later.

    Raises:
        ConfigError: a package is not installed, or the port is taken.
    """
    meter, sinks = resolved.run.meter, list[Sink]()
    if meter.tensorboard:
        sinks.append(TensorBoardSink(directory.path))
    if meter.prometheus_port is not None:
        from .prometheus import PrometheusSink

        sinks.append(
            PrometheusSink(meter.prometheus_host, meter.prometheus_port, directory.ledger, meter.currency)
        )
    if meter.wandb_project is not None:
        from .weights_and_biases import WandbSink

        config = resolved.run.model_dump(mode="json")
        sinks.append(WandbSink(meter.wandb_project, directory.path, config, resolved.steps))
    return sinks
