"""A limit on what GPUs may draw, for as long as a run lasts. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import ConfigError
from .nvml import Gpu, Nvml, NvmlError

log = logging.getLogger(__name__)


class PowerLimit:
    """Sets the limit of some GPUs, and gives them their own back at the end."""

    def __init__(self, gpus: Sequence[str], watts: float) -> None:
        """See that the GPUs take the limit, and that this process may set one; nothing changes yet.

        Raises:
            ConfigError: they do not, or it may not.
        """
        name = f"meter.power_limit_w = {watts:g}"
        self._watts, self._own_w = watts, dict[Gpu, float]()
        try:
            self._nvml = Nvml()
        except NvmlError as error:
            raise ConfigError(f"{name}: no GPU's limit can be set: NVML: {error}; leave it out") from error
        try:
            for gpu in map(self._nvml.gpu, gpus):
                lowest, highest = gpu.power_limits_w()
                if not lowest <= watts <= highest:
                    raise ConfigError(
                        f"{name}: {gpu.uuid} takes {lowest:g} to {highest:g} W; give one of these"
                    )
                own_w = gpu.own_limit_w()
                gpu.set_power_limit(own_w)  # the same again: tells whether it may be set
                self._own_w[gpu] = own_w
        except NvmlError as error:
            self._nvml.close()
            raise ConfigError(
                f"{name}: {error}; run as root, or let an administrator set it by nvidia-smi -pl {watts:g}"
            ) from error
        except ConfigError:
            self._nvml.close()
            raise

    def set(self) -> str:
        """Set it; say what it was.

        Raises:
            NvmlError: the driver refuses all of a sudden.
        """
        for gpu in self._own_w:
            gpu.set_power_limit(self._watts)
        before = ", ".join(f"{watts:g}" for watts in sorted(set(self._own_w.values())))
        return f"power limit {self._watts:g} W, was {before} W (after a kill: nvidia-smi -pl gives it back)"

    def close(self) -> None:
        """Give the GPUs their own limits back."""
        for gpu, watts in self._own_w.items():
            try:
                gpu.set_power_limit(watts)
            except NvmlError as error:
                log.warning("%s keeps a power limit of %g W: %s", gpu.uuid, self._watts, error)
        self._own_w = {}
        self._nvml.close()
