"""The little CUDA that a TensorRT session needs, through cuda-python: streams, pinned host and device memory."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.backends import _engine
from rdeploy.errors import MissingDependency, StageError

INSTALL = "pip install cuda-python"


def load() -> ModuleType:
    """Import the CUDA runtime's bindings.

    Raises:
        MissingDependency: cuda-python is not installed.
    """
    module: ModuleType = _engine.load("cuda.bindings.runtime", "cuda-python", INSTALL)
    return module


class Cuda:
    """The CUDA runtime's calls with their status checked; takes the bindings as an argument."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Call `runtime.name(...)` and return its value.

        Raises:
            MissingDependency: there is no driver, or it is too old.
            StageError: any other failure, as CUDA words it.
        """
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            text = self._runtime.cudaGetErrorString(status)[1]
            reason = text.decode() if isinstance(text, bytes) else str(text)
            if status.name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice"):
                raise MissingDependency(f"running this engine needs an NVIDIA GPU and its driver: {reason}")
            raise StageError("run", f"{name} failed: {reason}")
        return values[0] if values else None


class Buffer:
    """One tensor's memory: pinned on the host, mirrored on the device. Grows, never shrinks, until `free`."""

    def __init__(self, cuda: Cuda, runtime: Any, dtype: str) -> None:
        self._cuda, self._kinds, self._dtype = cuda, runtime.cudaMemcpyKind, np.dtype(dtype)
        self._host = self._capacity = 0
        self.device = 0

    def reserve(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the host side as an array of `shape`."""
        count = int(np.prod(shape))
        size = max(1, count * self._dtype.itemsize)
        if size > self._capacity:
            self.free()
            self._host = int(self._cuda.call("cudaHostAlloc", size, 0))
            self.device = int(self._cuda.call("cudaMalloc", size))
            self._capacity = size
        memory = memoryview((ctypes.c_ubyte * size).from_address(self._host))
        array: NDArray[Any] = np.frombuffer(memory, dtype=self._dtype, count=count)
        return array.reshape(shape)

    def upload(self, size: int, stream: int) -> None:
        """Start copying `size` bytes to the device."""
        kind = self._kinds.cudaMemcpyHostToDevice
        self._cuda.call("cudaMemcpyAsync", self.device, self._host, size, kind, stream)

    def download(self, size: int, stream: int) -> None:
        """Start copying `size` bytes back."""
        kind = self._kinds.cudaMemcpyDeviceToHost
        self._cuda.call("cudaMemcpyAsync", self._host, self.device, size, kind, stream)

    def free(self) -> None:
        """Give both sides back."""
        if self._host:
            self._cuda.call("cudaFreeHost", self._host)
        if self.device:
            self._cuda.call("cudaFree", self.device)
        self._host = self.device = self._capacity = 0
