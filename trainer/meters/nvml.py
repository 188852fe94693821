"""NVIDIA's management library: the only module that imports pynvml, which nvidia-ml-py brings. Imports no torch.

nvmlDeviceGetTotalEnergyConsumption counts mJ since the driver was loaded, nvmlDeviceGetPowerUsage and the power limits
are mW.
"""

from __future__ import annotations

from typing import Any

MILLI = 1e3


class NvmlError(Exception):
    """What NVML said, in its words."""


class Gpu:
    """One board; every call raises NvmlError where the driver refuses."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        """Take an open library and a device of it."""
        self._nvml, self._handle = nvml, handle
        self.uuid: str = self._ask("nvmlDeviceGetUUID")

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            raise NvmlError(str(error)) from error

    def energy_mj(self) -> int:
        """Give the millijoules since the driver was loaded."""
        return int(self._ask("nvmlDeviceGetTotalEnergyConsumption"))

    def power_w(self) -> float:
        """Give the present draw in watts."""
        return float(self._ask("nvmlDeviceGetPowerUsage") / MILLI)

    def power_limit_w(self) -> float:
        """Give what the driver lets it draw, after all limits."""
        return float(self._ask("nvmlDeviceGetEnforcedPowerLimit") / MILLI)

    def own_limit_w(self) -> float:
        """Give what it was told to draw at most, by whoever set its limit last."""
        return float(self._ask("nvmlDeviceGetPowerManagementLimit") / MILLI)

    def power_limits_w(self) -> tuple[float, float]:
        """Give the lowest and the highest limit that it takes."""
        lowest, highest = self._ask("nvmlDeviceGetPowerManagementLimitConstraints")
        return lowest / MILLI, highest / MILLI

    def set_power_limit(self, watts: float) -> None:
        """Change what it may draw; needs the rights of root, and lasts until the driver is loaded anew."""
        self._ask("nvmlDeviceSetPowerManagementLimit", round(watts * MILLI))

    def uncorrected_errors(self) -> int:
        """Count the memory errors since the driver was loaded that ECC could see and not mend."""
        kinds = self._nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self._nvml.NVML_VOLATILE_ECC
        return int(self._ask("nvmlDeviceGetTotalEccErrors", *kinds))


class Nvml:
    """The library, open until `close`."""

    def __init__(self) -> None:
        """Open it.

        Raises:
            NvmlError: there is no package, no library or no driver.
        """
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # pynvml has a class for each
            raise NvmlError(str(error)) from error
        self._nvml = pynvml

    def gpu(self, name: str) -> Gpu:
        """Find the board that an NVML index, a UUID or a MIG slice's UUID means."""
        nvml = self._nvml
        try:
            if name.isdigit():
                handle = nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                handle = nvml.nvmlDeviceGetHandleByUUID(name)
            if name.startswith("MIG-"):  # counters and limits are those of boards
                handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        except nvml.NVMLError as error:
            raise NvmlError(str(error)) from error
        return Gpu(nvml, handle)

    def driver(self) -> str:
        """Give the driver's version."""
        try:
            return str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as error:
            raise NvmlError(str(error)) from error

    def num_gpus(self) -> int:
        """Count the boards of the machine, whatever this process may see of them."""
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            raise NvmlError(str(error)) from error

    def close(self) -> None:
        """Let it go."""
        self._nvml.nvmlShutdown()
