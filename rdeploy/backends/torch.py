"""PyTorch itself, eager: what a user has today, and the honest baseline of every speed-up.

The engine is the program that `torch.export` makes of the module (a `.pt2` of plain data, which is read and checked before
PyTorch opens it), so it runs without the model's own code. It is FP32; on a GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import _engine, _layers, _trt
from rdeploy.errors import ConfigError, MissingDependency, StageError, Unsupported
from rdeploy.measured import LayerTime, LayerTimes
from rdeploy.types import Engine, QuantScheme, Target, TensorInfo

INSTALL = "pip install 'rdeploy[torch]'"
FLOATS = ("fp32",)
NEEDS_MODULE = True
"""It is not built from the ONNX graph: the program of the module lies beside it, as `steps.export` leaves it."""
NAME = "torch"
_WARM_RUNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Eager PyTorch has nothing to choose."""


def unavailable() -> str | None:
    return _engine.missing("torch", "PyTorch", INSTALL)


def version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency("PyTorch is not installed here", install=INSTALL) from None


def scheme(target: Target) -> QuantScheme:
    """Return TensorRT's scheme, so that asking for INT8 costs no graph of its own; INT8 is not executed here."""
    return _trt.SCHEME


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Any, name: str = NAME) -> Engine:
    """Copy the program beside the ONNX file to `directory/NAME.pt2`, and run it once.

    Raises:
        Unsupported: there is no program: the graph is INT8 or FP16, or came from an ONNX file.
        ConfigError: the program holds more than plain data.
    """
    record = _engine.BuildRecord(onnx, directory)
    program = onnx.with_suffix(".pt2")
    if not program.is_file():
        raise Unsupported(
            f"PyTorch runs the FP32 module itself, and there is none to {onnx.name}: build with --fp32 for it"
        )
    path = directory / f"{name}.pt2"
    shutil.copyfile(program, path)
    with Session(path) as session:
        session.run(_engine.zeros(session.inputs, batch=target.batch_sizes[0]))
    return record.engine(path, backend=name, version=version(), device=_device_name())


def cannot_run(engine: Engine) -> str | None:
    return unavailable()


def load_runtime() -> None:
    torch = _load()
    if torch.cuda.is_available():
        torch.cuda.init()


def open_session(path: Path, *, threads: int | None = None) -> Session:
    return Session(path, threads=threads)


def layer_times(
    path: Path,
    inputs: Mapping[str, NDArray[Any]],
    *,
    threads: int | None = None,
    runs: int = 30,
    compiled: bool = False,
) -> LayerTimes:
    """Return the operators' mean times from PyTorch's profiler: on a GPU the device's own, else the CPU's."""
    torch = _load()
    with Session(path, threads=threads, compiled=compiled) as session:
        for _ in range(_WARM_RUNS):
            session.run(inputs)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if session.device == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            start = time.perf_counter()
            for _ in range(runs):
                session.run(inputs)
            whole_ms = (time.perf_counter() - start) * 1000.0 / runs
    spent = "self_device_time_total" if session.device == "cuda" else "self_cpu_time_total"
    found = [(event.key, getattr(event, spent) / 1000.0 / runs) for event in profiler.key_averages()]
    kernels = [
        LayerTime(name=key, kind=key, mean_ms=mean_ms, precision="fp32") for key, mean_ms in found if mean_ms > 0
    ]
    return _layers.summed("PyTorch's profiler", kernels, whole_ms=whole_ms, runs=runs)


class Session:
    """A program on the GPU that is here, else on the CPU; with `compiled` it goes through `torch.compile`."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, path: Path, *, threads: int | None = None, compiled: bool = False) -> None:
        self._path, self._threads, self._compiled = path, threads, compiled
        self._call: Any = None

    def __enter__(self) -> Session:
        torch = self._torch = _load()
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        program = _open(self._path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.device == "cuda":
                program = torch.export.passes.move_to_device_pass(program, "cuda")
            module = program.module()
            self._call = torch.compile(module) if self._compiled else module
        self.inputs = tuple(
            _info(program, spec.arg.name) for spec in program.graph_signature.input_specs if _is(spec, "USER_INPUT")
        )
        self.outputs = tuple(
            _info(program, spec.arg.name) for spec in program.graph_signature.output_specs if _is(spec, "USER_OUTPUT")
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call = None
        self.inputs = self.outputs = ()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        _engine.check_inputs(self.inputs, inputs)
        torch = self._torch
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = [torch.from_numpy(np.ascontiguousarray(inputs[i.name])).to(self.device) for i in self.inputs]
                made = self._call(*given)
        except (RuntimeError, ValueError, TypeError) as error:
            raise StageError("run", f"PyTorch, {self._path}: {_engine.first_line(error)}") from error
        values = made if isinstance(made, (tuple, list)) else [made]
        return {i.name: value.cpu().numpy() for i, value in zip(self.outputs, values, strict=True)}


def _load() -> Any:
    return _engine.load("torch", "PyTorch", INSTALL)


def _open(path: Path) -> Any:
    """Open a program after it was found to hold plain data only.

    Raises:
        ConfigError: it is missing or damaged, or opening it could run code.
    """
    torch = _load()
    from rdeploy import pt2

    if not path.is_file():
        raise ConfigError(f"cannot read the engine {path}: No such file or directory")
    try:
        pt2.check_safe(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(path))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} is damaged, or no program of this PyTorch: build it again") from error


def _is(spec: Any, kind: str) -> bool:
    return bool(spec.kind.name == kind)


def _info(program: Any, name: str) -> TensorInfo:
    value = next(node for node in program.graph.nodes if node.name == name).meta["val"]
    shape = tuple(int(size) if isinstance(size, int) else -1 for size in value.shape)
    return TensorInfo(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)


def _device_name() -> str:
    gpus = hardware.gpus()
    return gpus[0].name if gpus and _load().cuda.is_available() else hardware.cpu_model()
