"""The state of an NVIDIA GPU, asked of the driver's management library (NVML) through ctypes: clocks, power, memory.

NVML is a part of the driver; on a Jetson it is missing or tells little. A fact that it does not tell is None.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_SM, _MEMORY = 1, 2
_UNKNOWN = (1 << 64) - 1
_MAX_PROCESSES = 64

_REASONS = {
    0x04: "its power cap",
    0x08: "a hardware slowdown",
    0x20: "its temperature (driver)",
    0x40: "its temperature (hardware)",
    0x80: "the power brake",
}
"""The bits of nvmlClocksThrottleReasons that slow a busy GPU down; idling and fixed clocks are none."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """What a GPU is doing now. `processes`: the id and the bytes of every compute process; `throttled`: what slows it."""

    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    throttled: tuple[str, ...] = ()
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    processes: tuple[tuple[int, int | None], ...] = ()


class Gpu:
    """One GPU by its PCI bus id (as CUDA names it), or the first one. Use `find`; it is open as long as the process."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    def state(self) -> GpuState:
        """Return everything that the driver tells at this moment."""
        power_mw = self._number("nvmlDeviceGetPowerUsage")
        memory = self._filled("nvmlDeviceGetMemoryInfo", _Memory())
        return GpuState(
            sm_clock_mhz=self._number("nvmlDeviceGetClockInfo", _SM),
            sm_clock_max_mhz=self._number("nvmlDeviceGetMaxClockInfo", _SM),
            memory_clock_mhz=self._number("nvmlDeviceGetClockInfo", _MEMORY),
            temperature_c=self._number("nvmlDeviceGetTemperature", 0),
            power_w=None if power_mw is None else power_mw / 1000.0,
            throttled=self._throttled(),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            processes=self._processes(),
        )

    def energy_j(self) -> float | None:
        """Return the joules since the driver was loaded (Volta and later), or None."""
        millijoules = self._filled("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        return None if millijoules is None else millijoules.value / 1000.0

    def power_w(self) -> float | None:
        """Return the watts now, or None."""
        power_mw = self._number("nvmlDeviceGetPowerUsage")
        return None if power_mw is None else power_mw / 1000.0

    def used_by_bytes(self, pid: int) -> int | None:
        """Return the GPU memory of one process, None where the driver does not see it (in a container, for one)."""
        return dict(self._processes()).get(pid)

    def _throttled(self) -> tuple[str, ...]:
        # The newer name of the same question came with driver 535.
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            if (bits := self._filled(name, ctypes.c_ulonglong())) is not None:
                break
        return tuple(text for bit, text in _REASONS.items() if bits is not None and bits.value & bit)

    def _processes(self) -> tuple[tuple[int, int | None], ...]:
        count, found = ctypes.c_uint(_MAX_PROCESSES), (_Process * _MAX_PROCESSES)()
        if not self._good("nvmlDeviceGetComputeRunningProcesses_v3", ctypes.byref(count), ctypes.byref(found)):
            return ()
        listed = found[: count.value]
        return tuple((int(one.pid), None if one.used == _UNKNOWN else int(one.used)) for one in listed)

    def _number(self, name: str, *arguments: int) -> int | None:
        value = ctypes.c_uint()
        return int(value.value) if self._good(name, *arguments, ctypes.byref(value)) else None

    def _filled(self, name: str, value: Any) -> Any:
        return value if self._good(name, ctypes.byref(value)) else None

    def _good(self, name: str, *arguments: Any) -> bool:
        function = getattr(self._library, name, None)
        return function is not None and function(self._handle, *arguments) == 0


def find(pci_bus_id: str = "", *, library: Any = None) -> Gpu | None:
    """Return the GPU with this PCI bus id, else the first one; None without a GPU, a driver or NVML."""
    try:
        library = ctypes.CDLL(_LIBRARY) if library is None else library
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    handle = ctypes.c_void_p()
    if pci_bus_id and library.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), ctypes.byref(handle)) == 0:
        return Gpu(library, handle)
    return Gpu(library, handle) if library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0 else None
