"""ONNX Runtime with its CUDA provider: the engine is the ONNX file; what the provider lacks runs on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import _engine, _trt, onnxruntime
from rdeploy.errors import MissingDependency
from rdeploy.measured import LayerTimes
from rdeploy.types import Engine, QuantScheme, Target

INSTALL = "pip install 'rdeploy[gpu]'"
FLOATS = ("fp32", "fp16")
PROVIDER = "CUDAExecutionProvider"
_SWAP = "pip uninstall onnxruntime && pip install onnxruntime-gpu"

version, load_runtime = onnxruntime.version, onnxruntime.load_runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """ONNX Runtime has nothing to choose when an engine is built."""


def unavailable() -> str | None:
    if (reason := _engine.missing("onnxruntime", "ONNX Runtime", INSTALL)) is not None:
        return reason
    if not hardware.gpus():
        return "ONNX Runtime's CUDA provider needs an NVIDIA GPU and its driver, and there is none here"
    if PROVIDER not in _engine.load("onnxruntime", "ONNX Runtime", INSTALL).get_available_providers():
        return str(MissingDependency("this ONNX Runtime is the one for CPUs, without the CUDA provider", install=_SWAP))
    return None


def scheme(target: Target) -> QuantScheme:
    """Return TensorRT's scheme: the provider has no INT8 kernels, it executes Q/DQ pairs in float, exact and slower."""
    return _trt.SCHEME


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Options) -> Engine:
    """Copy the ONNX file to `directory/onnxruntime_cuda.onnx`, and run it once.

    Raises:
        ConfigError: the file is not a model that ONNX Runtime can load.
        StageError: it does not run on the GPU.
    """
    record = _engine.BuildRecord(onnx, directory)
    path = directory / "onnxruntime_cuda.onnx"
    shutil.copyfile(onnx, path)
    with open_session(path) as session:
        session.run(_engine.zeros(session.inputs, batch=target.batch_sizes[0]))
    gpu = hardware.gpus()[0]
    return record.engine(path, backend="onnxruntime_cuda", version=version(), device=gpu.name)


def cannot_run(engine: Engine) -> str | None:
    return unavailable()


def open_session(path: Path, *, threads: int | None = None) -> onnxruntime.Session:
    return onnxruntime.Session(path, threads=threads, providers=(PROVIDER, onnxruntime.CPU))


def layer_times(
    path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 30
) -> LayerTimes:
    """Return the kernels' times from ONNX Runtime's own profile: on the GPU it times their launch, not their execution."""
    return onnxruntime.profiled(path, inputs, threads=threads, runs=runs, providers=(PROVIDER, onnxruntime.CPU))
