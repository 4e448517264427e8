"""Run an engine of either TensorRT: host arrays in, host arrays out, one stream, pinned buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import _cuda, _engine, _trt
from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.types import Engine, TensorInfo


def cannot_run(engine: Engine, *, title: str, version: str) -> str | None:
    """Return why an engine of a TensorRT of this version does not run on this machine, or None."""
    gpus = hardware.gpus()
    if not gpus:
        return _no_gpu(f"a {title} engine for {', '.join(engine.built_for)}")
    if engine.backend_version != version:
        return f"built with {title} {engine.backend_version}, here is {version}: build it again on this machine"
    if engine.built_for and gpus[0].compute_capability not in engine.built_for:
        here = f"{gpus[0].name} is {gpus[0].compute_capability}"
        return f"built for {', '.join(engine.built_for)}, and {here}: build it again for this GPU"
    return _engine.missing("cuda", "cuda-python", _cuda.INSTALL)


def _no_gpu(what: str) -> str:
    return f"running {what} needs an NVIDIA GPU and its driver, and there is none here"


class Session:
    """An execution context with its buffers. `flavour` and `runtime` are loaded when the session is entered."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(
        self, path: Path, *, flavour: Callable[[], _trt.Flavour], runtime: Callable[[], Any] = _cuda.load
    ) -> None:
        self._path, self._load_flavour, self._load_runtime = path, flavour, runtime
        self._stack = contextlib.ExitStack()
        self._runtime: Any = None

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as stack:
            self._flavour = self._load_flavour()
            self._logger = _trt.logger_of(self._flavour)
            self._logger.recent.clear()
            self.engine = self._deserialize()
            self._context = self.engine.create_execution_context()
            if self._context is None:
                raise StageError(
                    "run", f"no memory or no kernel for {self._path}: {_trt.last_error(self._logger.recent)}"
                )
            runtime = self._load_runtime()
            self._cuda = _cuda.Cuda(runtime)
            stream = self._cuda.call("cudaStreamCreate")
            stack.callback(self._cuda.call, "cudaStreamDestroy", stream)
            self._stream = int(stream)
            self._buffers: dict[str, _cuda.Buffer] = {}
            inputs, outputs = self._tensors()
            for info in (*inputs, *outputs):
                self._buffers[info.name] = _cuda.Buffer(self._cuda, runtime, info.dtype)
                stack.callback(self._buffers[info.name].free)
            self._stack = stack.pop_all()
        self.inputs, self.outputs = inputs, outputs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inputs = self.outputs = ()
        self._stack.close()
        # The order matters to TensorRT: what was made last goes first.
        self._context = self.engine = self._runtime = None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        _engine.check_inputs(self.inputs, inputs)
        for info in self.inputs:
            self._feed(info.name, inputs[info.name])
        staged = {}
        for info in self.outputs:
            staged[info.name] = self._buffers[info.name].reserve(tuple(self._context.get_tensor_shape(info.name)))
            self._context.set_tensor_address(info.name, self._buffers[info.name].device)
        if not self._context.execute_async_v3(self._stream):
            raise StageError("run", f"{self._flavour.title}, {self._path}: {_trt.last_error(self._logger.recent)}")
        for name, array in staged.items():
            self._buffers[name].download(array.nbytes, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return {name: array.copy() for name, array in staged.items()}

    def _feed(self, name: str, array: NDArray[Any]) -> None:
        if not self._context.set_input_shape(name, array.shape):
            low, _, high = self.engine.get_tensor_profile_shape(name, 0)
            raise ConfigError(
                f"batch {array.shape[0]} is outside what {self._path} was built for: {low[0]} to {high[0]}"
            )
        buffer = self._buffers[name]
        np.copyto(buffer.reserve(array.shape), array)
        self._context.set_tensor_address(name, buffer.device)
        buffer.upload(array.nbytes, self._stream)

    def _deserialize(self) -> Any:
        """Return the engine; say apart whether the file, the version or the missing driver is to blame."""
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the engine {self._path}: {error.strerror}") from error
        title = self._flavour.title
        self._runtime = self._flavour.trt.Runtime(self._logger)
        if content and self._runtime is not None:
            engine = self._runtime.deserialize_cuda_engine(content)
            if engine is not None:
                return engine
        lines = self._logger.recent
        if not content or any("Serialization" in message for severity, message in lines if severity <= 1):
            raise ConfigError(f"{self._path} is damaged, or no engine of this {title}: build it again")
        if not hardware.gpus():
            raise MissingDependency(_no_gpu(f"a {title} engine"))
        raise ConfigError(f"{title} cannot load {self._path}: {_trt.last_error(lines)}")

    def _tensors(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        found: tuple[list[TensorInfo], list[TensorInfo]] = ([], [])
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            dtype, shape = self.engine.get_tensor_dtype(name), self.engine.get_tensor_shape(name)
            is_output = self.engine.get_tensor_mode(name) == self._flavour.trt.TensorIOMode.OUTPUT
            found[is_output].append(_trt.tensor_info(self._flavour, name, dtype, shape))
        return tuple(found[0]), tuple(found[1])
