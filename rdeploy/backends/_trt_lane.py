"""One execution context with its stream and buffers: submit a batch, do something else, collect its outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.backends import _cuda, _trt
from rdeploy.errors import ConfigError, InvariantError, StageError
from rdeploy.types import TensorInfo

Shapes = tuple[tuple[int, ...], ...]


class Lane:
    """Copies in, executes and copies out on a stream of its own; one batch is under way at a time.

    The first run of a shape is enqueued call by call; the second is captured as a CUDA graph, which every further run of
    that shape launches at once. Where a network cannot be captured it stays call by call.
    """

    def __init__(self, context: Any, cuda: _cuda.Cuda, *, where: str, logger: Any, use_graphs: bool) -> None:
        self._context, self._cuda, self._where, self._logger = context, cuda, where, logger
        self._use_graphs = use_graphs
        self._graphs: dict[Shapes, _cuda.Graph] = {}
        self._seen: set[Shapes] = set()
        self._profile = 0
        self._staged: dict[str, NDArray[Any]] | None = None
        self._watch: _cuda.Watch | None = None
        self._stack = contextlib.ExitStack()

    def open(self, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> Lane:
        """Make the stream and the buffers; `close` frees them."""
        self._inputs, self._outputs = inputs, outputs
        with contextlib.ExitStack() as stack:
            handle = self._cuda.call("cudaStreamCreate")
            stack.callback(self._cuda.call, "cudaStreamDestroy", handle)
            self._stream = int(handle)
            self._buffers = {info.name: _cuda.Buffer(self._cuda, info.dtype) for info in (*inputs, *outputs)}
            for buffer in self._buffers.values():
                stack.callback(buffer.free)
            stack.callback(self._forget_graphs)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Wait for what is under way, and free everything."""
        if self._staged is not None:
            with contextlib.suppress(StageError):
                self._cuda.call("cudaStreamSynchronize", self._stream)
            self._staged = None
        self._stack.close()
        self._context = None

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Start a batch. The arrays are copied before this returns.

        Raises:
            ConfigError: the batch is outside what the engine was built for.
            StageError: TensorRT or CUDA refuses.
        """
        if self._staged is not None:
            raise InvariantError("a batch is under way on this lane: collect it first")
        shapes = tuple(inputs[info.name].shape for info in self._inputs)
        self._choose_profile(shapes)
        moved = False
        for info in self._inputs:
            buffer = self._buffers[info.name]
            before = buffer.device
            np.copyto(buffer.reserve(inputs[info.name].shape), inputs[info.name])
            moved |= buffer.device != before
            self._set_shape(info.name, inputs[info.name].shape, buffer)
        self._staged, grown = self._stage_outputs()
        if moved or grown:  # graphs hold addresses
            self._forget_graphs()
        try:
            self._launch(shapes)
        except StageError:
            self._staged = None
            raise

    def collect(self) -> dict[str, NDArray[Any]]:
        """Wait for the batch under way and return its outputs.

        Raises:
            InvariantError: there is none.
        """
        if self._staged is None:
            raise InvariantError("no batch is under way on this lane")
        staged, self._staged = self._staged, None
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return {name: array.copy() for name, array in staged.items()}

    def attach(self, profiler: Any) -> None:
        """Have TensorRT report the time of every layer; such runs cannot be graphs."""
        self._use_graphs = False
        self._forget_graphs()
        self._context.profiler = profiler

    def time_device(self) -> None:
        """Have the GPU's clock run along with every batch from now on; `device_ms` tells."""
        if self._watch is None:
            self._watch = self._stack.enter_context(_cuda.Watch(self._cuda, self._stream))

    @property
    def device_ms(self) -> float:
        """What the last batch took on the stream, from the first copy in to the last copy out."""
        if self._watch is None:
            raise InvariantError("the device's clock was not started")
        return self._watch.elapsed_ms()

    def transfers_ms(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Copy a batch in and its outputs out, computing nothing, and return what each way took."""
        self.submit(inputs)
        self.collect()
        found = {}
        with _cuda.Watch(self._cuda, self._stream) as watch:
            for name, infos in (("upload", self._inputs), ("download", self._outputs)):
                watch.start()
                for info in infos:
                    buffer = self._buffers[info.name]
                    buffer.upload(self._stream) if name == "upload" else buffer.download(self._stream)
                watch.stop()
                self._cuda.call("cudaStreamSynchronize", self._stream)
                found[name] = watch.elapsed_ms()
        return found

    def _choose_profile(self, shapes: Shapes) -> None:
        """Take the optimization profile whose tuned-for batch is nearest among those that hold this batch."""
        engine, name = self._context.engine, self._inputs[0].name
        if engine.num_optimization_profiles < 2:
            return
        batch = shapes[0][0]
        ranges = [engine.get_tensor_profile_shape(name, i) for i in range(engine.num_optimization_profiles)]
        fitting = [i for i, (low, _, high) in enumerate(ranges) if low[0] <= batch <= high[0]]
        if not fitting:
            self._refuse_batch(batch, [(low[0], high[0]) for low, _, high in ranges])
        best = min(fitting, key=lambda i: abs(ranges[i][1][0] - batch))
        if best != self._profile:
            if not self._context.set_optimization_profile_async(best, self._stream):
                raise StageError("run", f"{self._where}: {_trt.last_error(self._logger.recent)}")
            self._cuda.call("cudaStreamSynchronize", self._stream)
            self._profile = best
            self._forget_graphs()

    def _set_shape(self, name: str, shape: tuple[int, ...], buffer: _cuda.Buffer) -> None:
        if not self._context.set_input_shape(name, shape):
            low, _, high = self._context.engine.get_tensor_profile_shape(name, self._profile)
            self._refuse_batch(shape[0], [(low[0], high[0])])
        self._context.set_tensor_address(name, buffer.device)

    def _refuse_batch(self, batch: int, ranges: Sequence[tuple[int, int]]) -> None:
        known = ", ".join(f"{low} to {high}" for low, high in ranges)
        raise ConfigError(f"batch {batch} is outside what {self._where} was built for: {known}")

    def _stage_outputs(self) -> tuple[dict[str, NDArray[Any]], bool]:
        staged, moved = {}, False
        for info in self._outputs:
            buffer = self._buffers[info.name]
            before = buffer.device
            staged[info.name] = buffer.reserve(tuple(self._context.get_tensor_shape(info.name)))
            moved |= buffer.device != before
            self._context.set_tensor_address(info.name, buffer.device)
        return staged, moved

    def _launch(self, shapes: Shapes) -> None:
        if self._watch is None:
            self._run(shapes)
            return
        self._watch.start()
        self._run(shapes)
        self._watch.stop()

    def _run(self, shapes: Shapes) -> None:
        if (graph := self._graphs.get(shapes)) is not None:
            graph.launch(self._stream)
        elif self._use_graphs and shapes in self._seen and self._is_capturable():
            self._capture(shapes)
        else:
            self._seen.add(shapes)
            self._enqueue()

    def _is_capturable(self) -> bool:
        asked = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX tells
        return asked is None or bool(asked(self._stream))

    def _capture(self, shapes: Shapes) -> None:
        try:
            graph = _cuda.Graph.captured(self._cuda, self._stream, self._enqueue)
        except StageError:
            self._use_graphs = False
            self._enqueue()
            return
        self._graphs[shapes] = graph
        graph.launch(self._stream)

    def _enqueue(self) -> None:
        for info in self._inputs:
            self._buffers[info.name].upload(self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise StageError("run", f"{self._where}: {_trt.last_error(self._logger.recent)}")
        for info in self._outputs:
            self._buffers[info.name].download(self._stream)

    def _forget_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.free()
        self._graphs.clear()
        self._seen.clear()
