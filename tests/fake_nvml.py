"""A driver in Python under the real nvidia-ml-py: its functions, its handles and its error codes."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest

NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED
NO_PERMISSION = pynvml.NVML_ERROR_NO_PERMISSION
MIG_OFFSET = 100


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class FakeNvml(SimpleNamespace):
    """A driver of devices whose counters follow the clock; `errors` maps (function, device) to error codes."""

    def __init__(self, clock: Callable[[], float], watts: list[float]) -> None:
        super().__init__()
        self.clock, self.watts = clock, watts
        self.errors: dict[tuple[str, int], int] = {}
        self.boot_s = [0.0] * len(watts)
        self.frozen = [False] * len(watts)
        self.num_shutdowns = 0
        self.limits_mw = [700_000] * len(watts)

    def nvmlInitWithFlags(self, flags):
        return self.errors.get(("init", 0), 0)

    def nvmlShutdown(self):
        self.num_shutdowns += 1
        return 0

    def nvmlErrorString(self, code):
        return {NOT_SUPPORTED: b"Not Supported", NO_PERMISSION: b"Insufficient Permissions"}.get(
            code, b"Unknown Error"
        )

    def nvmlDeviceGetHandleByIndex_v2(self, index, ref):
        return self._give(index.value, ref)

    def nvmlDeviceGetHandleByUUID(self, uuid, ref):
        text = (uuid if isinstance(uuid, bytes) else uuid.value).decode()
        shift = MIG_OFFSET if text.startswith("MIG-") else 0
        return self._give(int(text.rpartition("-")[2]) + shift, ref)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle, ref):
        return self._give(self._device(handle) - MIG_OFFSET, ref)

    def nvmlDeviceGetUUID(self, handle, buffer, length):
        buffer.value = f"GPU-{self._device(handle)}".encode()
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, ref):
        device = self._device(handle)
        if code := self.errors.get(("energy", device)):
            return code
        elapsed_s = 50.0 if self.frozen[device] else self.clock() - self.boot_s[device]
        ref._obj.value = int(self.watts[device] * 1000 * elapsed_s)
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, ref):
        device = self._device(handle)
        if code := self.errors.get(("power", device)):
            return code
        ref._obj.value = int(self.watts[device] * 1000)
        return 0

    def _give(self, device, ref):
        if device % MIG_OFFSET >= len(self.watts):
            return pynvml.NVML_ERROR_INVALID_ARGUMENT
        ctypes.cast(ref, ctypes.POINTER(ctypes.c_void_p))[0] = device + 1  # NULL would be no handle
        return 0

    def _device(self, handle):
        return ctypes.cast(handle, ctypes.c_void_p).value - 1

    def nvmlDeviceGetEnforcedPowerLimit(self, handle, ref):
        device = self._device(handle)
        if code := self.errors.get(("limit", device)):
            return code
        ref._obj.value = self.limits_mw[device]
        return 0

    def nvmlDeviceGetPowerManagementLimit(self, handle, ref):
        ref._obj.value = self.limits_mw[self._device(handle)]
        return 0

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle, lowest, highest):
        lowest._obj.value, highest._obj.value = 200_000, 700_000
        return 0

    def nvmlDeviceSetPowerManagementLimit(self, handle, limit):
        device = self._device(handle)
        if code := self.errors.get(("set limit", device)):
            return code
        self.limits_mw[device] = limit.value
        return 0


def install(library: FakeNvml, patch: pytest.MonkeyPatch | None = None) -> None:
    """Put a driver under pynvml; without `patch` for the rest of the process."""
    (patch or pytest.MonkeyPatch()).setattr(pynvml, "nvmlLib", library)
    pynvml._nvmlGetFunctionPointer_cache.clear()
