"""NVIDIA TensorRT 10.3 to 11 on the GPU that is here: strongly typed networks, INT8 as explicit Q/DQ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import hardware
from rdeploy.backends import _engine, _trt, _trt_session
from rdeploy.errors import MissingDependency, Unsupported
from rdeploy.types import Engine, QuantScheme, Target

TITLE = "TensorRT"
INSTALL = "pip install 'rdeploy[tensorrt]'"
_NOT_HERE = (
    "TensorRT is not installed here (where JetPack or a container of NVIDIA's brings it, pip must never replace it)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How hard to search (0 to 5, None is TensorRT's default of 3) and what the search may use."""

    workspace_mb: int | None = None
    optimization_level: int | None = None
    sparse_weights: bool = False
    tf32: bool = True


def unavailable() -> str | None:
    try:
        _flavour()
    except MissingDependency as error:
        return str(error)
    if not hardware.gpus():
        return "TensorRT builds on the GPU that will run the engine, and there is no NVIDIA GPU or driver here"
    return None


def version() -> str:
    return str(_flavour().trt.__version__)


def scheme(target: Target) -> QuantScheme:
    """Return symmetric signed INT8; a residual's convolution side stays unquantized, as TensorRT fuses that Add."""
    return _trt.SCHEME


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Options) -> Engine:
    """Build `directory/tensorrt.engine` for the GPU that is here, with `tensorrt.log` beside it.

    Raises:
        MissingDependency: no TensorRT, or no GPU.
        Unsupported: the parser refuses a node, or the profile is for another GPU.
        StageError: the builder fails.
    """
    record = _engine.BuildRecord(onnx, directory)
    flavour, gpu = _flavour(), _gpu(target)

    def configure(config: Any) -> None:
        _trt.set_options(
            flavour.trt,
            config,
            workspace_mb=options.workspace_mb,
            sparse_weights=options.sparse_weights,
            tf32=options.tf32,
        )
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level

    plan = _trt.build_plan(flavour, onnx, directory, target=target, configure=configure)
    return record.engine(
        plan.path,
        backend="tensorrt",
        version=version(),
        device=gpu.name,
        built_for=(gpu.compute_capability,),
        executed_precision=_trt.count_precisions(_kernels(flavour, plan.path)),
        notes=_trt.planned_memory(plan.log),
    )


def cannot_run(engine: Engine) -> str | None:
    try:
        here = version()
    except MissingDependency as error:
        return str(error)
    return _trt_session.cannot_run(engine, title=TITLE, version=here)


def open_session(path: Path, *, threads: int | None = None) -> _trt_session.Session:
    return _trt_session.Session(path, flavour=_flavour)


def _flavour() -> _trt.Flavour:
    if _engine.missing("tensorrt", TITLE, INSTALL) is not None:
        raise MissingDependency(_NOT_HERE, install=INSTALL)
    return _trt.Flavour("tensorrt", TITLE, _engine.load("tensorrt", TITLE, INSTALL))


def _gpu(target: Target) -> hardware.Gpu:
    gpus = hardware.gpus()
    if not gpus:
        raise MissingDependency("TensorRT builds on the GPU that will run the engine, and there is no NVIDIA GPU here")
    wanted = target.compute_capabilities
    if wanted and gpus[0].compute_capability not in wanted:
        here = f"{gpus[0].name} ({gpus[0].compute_capability})"
        raise Unsupported(
            f"target {target.name!r} is for {', '.join(wanted)}, the GPU here is {here}: "
            "build there, or with --target auto"
        )
    return gpus[0]


def _kernels(flavour: _trt.Flavour, path: Path) -> tuple[tuple[str, str], ...]:
    runtime = flavour.trt.Runtime(_trt.logger_of(flavour))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    return _trt.kernels_in_engine(flavour, engine) if engine is not None else ()
