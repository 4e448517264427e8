"""Runtimes that execute an engine: one module each, found by file name.

A backend module defines what the `Backend` protocol lists. Nothing here, and no module at import time, loads a vendor
library: `unavailable()` is how one asks whether it is there. `build_engine` and `open_session` do the real import.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from numpy.typing import NDArray

from rdeploy import plugins
from rdeploy.backends._engine import Misfit as Misfit
from rdeploy.backends._engine import engine_files as engine_files
from rdeploy.backends._engine import engine_sha256 as engine_sha256
from rdeploy.measured import LayerTimes
from rdeploy.types import Engine, QuantScheme, Target, TensorInfo


class Session(Protocol):
    """An engine that is ready to run. Nothing touches a device before `__enter__`."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once, synchronously, host memory in and out: input name -> array gives output name -> array."""
        ...


class Backend(Protocol):
    """What a module in this folder defines (a module can implement a Protocol)."""

    Options: type
    """The plugin's own frozen options; they come from the profile's `backend_options`."""

    FLOATS: tuple[str, ...]
    """The float types that its kernels compute in when a graph is written in them: fp32, and fp16 where that pays."""

    # A backend that runs the PyTorch module itself has NEEDS_MODULE = True: it finds `model.pt2` beside the ONNX file.
    # One that builds for GPUs that are not here has AHEAD_OF_TIME = True.

    def unavailable(self) -> str | None:
        """Return why this backend cannot build here and the exact pip command, or None when it can."""
        ...

    def version(self) -> str:
        """Return the runtime's version. Raises MissingDependency when it is not installed."""
        ...

    def scheme(self, target: Target) -> QuantScheme:
        """Return how INT8 must be expressed for this runtime on this target."""
        ...

    def build_engine(self, onnx: Path, directory: Path, *, target: Target, options: Any) -> Engine:
        """Build the engine of an ONNX file into `directory`; `Engine.path` is relative to it."""
        ...

    def cannot_run(self, engine: Engine) -> str | None:
        """Return why this engine cannot run on this machine, or None.

        A `Misfit` where it was built for other hardware or another version; else something is missing here.
        """
        ...

    def load_runtime(self) -> None:
        """Load the vendor's libraries (and make a GPU's context), no engine yet: what a process costs before any."""
        ...

    def open_session(self, path: Path, *, threads: int | None = None) -> Session:
        """Return a session over an engine file, not yet entered.

        Where the device has a clock of its own, the session has `time_device()`, `device_clock`, `device_ms` and
        `transfers_ms(inputs)` as well (see `_trt_session`).
        """
        ...

    def layer_times(
        self, path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 30
    ) -> LayerTimes:
        """Return the kernels' times from the runtime's own profiler. Only where it has one: the reference has not."""
        ...


def find(name: str) -> Any:
    """Import a backend by name; the result satisfies `Backend`."""
    return plugins.find("rdeploy.backends", name)


def names() -> tuple[str, ...]:
    """Return the names of all backends, installed or not."""
    return plugins.names("rdeploy.backends")
