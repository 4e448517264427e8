"""The device's own clock: a session that has one tells, after each run, how long the device worked on it.

Such a session has `time_device()`, which starts it, and then `device_clock` (how it is read) and `device_ms` (that of the
last run). `transfers_ms(inputs)` tells what the copies in and out take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rdeploy import hardware
from rdeploy.backends import _cuda
from rdeploy.errors import MissingDependency

_NONE = "none: a CPU has no clock but the wall's, and of a GPU this runtime tells none"


def start_clock(session: Any) -> None:
    """Have the device's clock run along, where there is one."""
    if hasattr(session, "time_device"):
        session.time_device()


def free_bytes() -> Callable[[], int] | None:
    """Return what tells the device memory that is free (cudaMemGetInfo), or None without a GPU or CUDA's bindings."""
    if not hardware.gpus():
        return None
    try:
        cuda = _cuda.Cuda(_cuda.load())
    except MissingDependency:
        return None
    return lambda: cuda.free_and_total_bytes()[0]


def clock_of(session: Any) -> str:
    """Say how a session reads its device's clock, or why it has none."""
    return str(getattr(session, "device_clock", "") or _NONE)


class Timed:
    """A run that also keeps the device's time of every call, in `device_ms`; empty where there is no such clock."""

    def __init__(self, session: Any, run: Callable[[], object]) -> None:
        self._session, self._run = session, run
        self._has_clock = bool(getattr(session, "device_clock", ""))
        self.device_ms: list[float] = []

    def __call__(self) -> None:
        self._run()
        if self._has_clock:
            self.device_ms.append(self._session.device_ms)
