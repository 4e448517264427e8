"""The CUDA that a TensorRT session needs, through cuda-python: streams, graphs, pinned host and device memory, events."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.backends import _engine
from rdeploy.errors import MissingDependency, StageError

INSTALL = "pip install cuda-python"


def missing() -> str | None:
    """Return that cuda-python is not installed and how to install it, or None; imports nothing."""
    return _engine.missing("cuda", "cuda-python", INSTALL)


def load() -> ModuleType:
    """Import the CUDA runtime's bindings.

    Raises:
        MissingDependency: cuda-python is not installed.
    """
    module: ModuleType = _engine.load("cuda.bindings.runtime", "cuda-python", INSTALL)
    return module


def make_context(runtime: Any = None) -> None:
    """Make the CUDA context that the first other call would make."""
    Cuda(load() if runtime is None else runtime).call("cudaFree", 0)


class Cuda:
    """The CUDA runtime's calls with their status checked; takes the bindings as an argument."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Call `runtime.name(...)` and return its value.

        Raises:
            MissingDependency: there is no driver, or it is too old.
            StageError: any other failure, as CUDA words it.
        """
        status, *values = getattr(self.runtime, name)(*arguments)
        if int(status) != 0:
            text = self.runtime.cudaGetErrorString(status)[1]
            reason = text.decode() if isinstance(text, bytes) else str(text)
            if status.name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice"):
                raise MissingDependency(f"running this engine needs an NVIDIA GPU and its driver: {reason}")
            raise StageError("run", f"{name} failed: {reason}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def free_and_total_bytes(self) -> tuple[int, int]:
        """Return the device memory that is free and all of it (cudaMemGetInfo)."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)


class Watch:
    """Two events on a stream: what lies between them took `elapsed_ms` of the GPU's own time."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream = cuda, stream
        self._events: list[Any] = []

    def __enter__(self) -> Watch:
        self._events = [self._cuda.call("cudaEventCreate") for _ in range(2)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self._events:
            self._cuda.call("cudaEventDestroy", event)
        self._events = []

    def start(self) -> None:
        """Begin: what is enqueued from here on counts."""
        self._cuda.call("cudaEventRecord", self._events[0], self._stream)

    def stop(self) -> None:
        """End: what is enqueued from here on does not count."""
        self._cuda.call("cudaEventRecord", self._events[1], self._stream)

    def elapsed_ms(self) -> float:
        """Return the time in between; the stream must have come past it."""
        return float(self._cuda.call("cudaEventElapsedTime", *self._events))


class Buffer:
    """One tensor's memory: pinned on the host, mirrored on the device. Grows, never shrinks, until `free`."""

    def __init__(self, cuda: Cuda, dtype: str) -> None:
        self._cuda, self._dtype = cuda, np.dtype(dtype)
        self._host = self._capacity = self._size = 0
        self.device = 0

    def reserve(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the host side as an array of `shape`; `upload` and `download` move that many bytes."""
        count = int(np.prod(shape))
        self._size = max(1, count * self._dtype.itemsize)
        if self._size > self._capacity:
            size = self._size
            self.free()
            self._host = int(self._cuda.call("cudaHostAlloc", size, 0))
            self.device = int(self._cuda.call("cudaMalloc", size))
            self._capacity = self._size = size
        memory = memoryview((ctypes.c_ubyte * self._size).from_address(self._host))
        array: NDArray[Any] = np.frombuffer(memory, dtype=self._dtype, count=count)
        return array.reshape(shape)

    def upload(self, stream: int) -> None:
        """Start copying to the device."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda.call("cudaMemcpyAsync", self.device, self._host, self._size, kind, stream)

    def download(self, stream: int) -> None:
        """Start copying back."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._cuda.call("cudaMemcpyAsync", self._host, self.device, self._size, kind, stream)

    def free(self) -> None:
        """Give both sides back."""
        if self._host:
            self._cuda.call("cudaFreeHost", self._host)
        if self.device:
            self._cuda.call("cudaFree", self.device)
        self._host = self.device = self._capacity = self._size = 0


class Graph:
    """What was enqueued on a stream, recorded once and launched as one."""

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self._executable = cuda, executable

    @classmethod
    def captured(cls, cuda: Cuda, stream: int, enqueue: Callable[[], None]) -> Graph:
        """Record what `enqueue` puts on the stream; nothing of it is executed.

        Raises:
            StageError: something in it cannot be recorded; the stream is as it was before.
        """
        mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except StageError:
            with contextlib.suppress(StageError):  # a capture that failed must be ended, and says so again
                cuda.call("cudaStreamEndCapture", stream)
            raise
        graph = cuda.call("cudaStreamEndCapture", stream)
        try:
            return cls(cuda, cuda.call("cudaGraphInstantiate", graph, 0))
        finally:
            cuda.call("cudaGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        """Start all of it."""
        self._cuda.call("cudaGraphLaunch", self._executable, stream)

    def free(self) -> None:
        """Give it back."""
        self._cuda.call("cudaGraphExecDestroy", self._executable)
