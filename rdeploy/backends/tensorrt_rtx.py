"""NVIDIA TensorRT-RTX: engines built ahead of time for named GPUs, on a machine that needs none itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rdeploy import hardware, serde
from rdeploy.backends import (
    _cuda,
    _engine,
    _trt,
    _trt_layers,
    _trt_opening,
    _trt_options,
    _trt_report,
    _trt_session,
    _trt_weights,
)
from rdeploy.errors import MissingDependency, Unsupported
from rdeploy.measured import LayerTimes
from rdeploy.types import Engine, QuantScheme, Target

TITLE = "TensorRT-RTX"
INSTALL = "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
_MODULES = ("tensorrt_rtx_bindings", "tensorrt_rtx")
_TURING = "sm_75"
FLOATS = ("fp32", "fp16")
AHEAD_OF_TIME = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(_trt_options.BuildOptions):
    """What TensorRT and TensorRT-RTX share; kernels are chosen on the GPU, when the engine is first loaded there."""


def unavailable() -> str | None:
    try:
        _flavour()
    except MissingDependency as error:
        return str(error)
    return None


def version() -> str:
    for distribution in ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(_flavour().trt.__version__)


def scheme(target: Target) -> QuantScheme:
    """Return symmetric signed INT8, as for TensorRT. (Documented there for weights of matrix products only.)"""
    return _trt.SCHEME


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Options) -> Engine:
    """Build `directory/tensorrt_rtx.engine`, one engine for all of `target.compute_capabilities`.

    Without any, it is built for the GPU that is here, and where there is none for every one from Ampere on that this
    version knows. `tensorrt_rtx.log` beside it lists the kernels, from which the executed precision is read;
    `tensorrt_rtx.layers.json` has them for machines.

    Raises:
        MissingDependency: TensorRT-RTX is not installed.
        Unsupported: the version does not know a compute capability, or the parser refuses a node.
        StageError: the builder fails.
    """
    record = _engine.BuildRecord(onnx, directory)
    flavour = _flavour()
    capabilities = _capabilities(flavour.trt, target)

    def configure(config: Any) -> None:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(flavour.trt.ComputeCapability, _member(capability)), index)

    plan = _trt.build_plan(flavour, onnx, directory, target=target, options=options, configure=configure)
    _trt_opening.keep(plan.path, _trt_opening.Opening(host_code=options.lean_runtime))
    layers = _trt_report.layers_in_log(plan.log)
    (directory / "tensorrt_rtx.layers.json").write_text(serde.dumps({"Layers": layers}))
    return record.engine(
        plan.path,
        backend="tensorrt_rtx",
        version=version(),
        device=f"built ahead of time for {', '.join(capabilities)}",
        built_for=capabilities,
        fingerprint=_trt_options.fingerprint(options),
        executed_precision=_trt_report.count_precisions(_trt_report.kernels(layers)),
        notes=_notes(plan, layers, options),
    )


def cannot_run(engine: Engine) -> str | None:
    return unavailable() or _trt_session.cannot_run(engine, title=TITLE, version=version())


def load_runtime() -> None:
    _flavour()
    _cuda.make_context()


def open_session(path: Path, *, threads: int | None = None) -> _trt_session.Session:
    return _trt_session.Session(path, flavour=_flavour)


def layer_times(
    path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 30
) -> LayerTimes:
    """Return the layers' times from the profiler of TensorRT itself."""
    return _trt_layers.layer_times(_trt_session.Session(path, flavour=_flavour, use_graphs=False), inputs, runs=runs)


def known_capabilities(trt: Any) -> tuple[str, ...]:
    """Return the compute capabilities that this version builds for, oldest first."""
    numbers = [re.fullmatch(r"SM(\d+)", name) for name in trt.ComputeCapability.__members__]
    return tuple(f"sm_{n}" for n in sorted(int(number.group(1)) for number in numbers if number))


def _flavour() -> _trt.Flavour:
    module = next((name for name in _MODULES if importlib.util.find_spec(name) is not None), _MODULES[0])
    return _trt.Flavour("tensorrt_rtx", TITLE, _engine.load(module, TITLE, INSTALL))


def _capabilities(trt: Any, target: Target) -> tuple[str, ...]:
    known = known_capabilities(trt)
    wanted: Sequence[str] = target.compute_capabilities
    if not wanted:
        here = tuple(gpu.compute_capability for gpu in hardware.gpus()[:1])
        return here if here and here[0] in known else tuple(name for name in known if name != _TURING)
    for capability in wanted:
        if capability not in known:
            raise Unsupported(
                f"{TITLE} {version()} does not build for {capability} (target {target.name!r}); "
                f"it knows {', '.join(known)}: use the backend tensorrt on that GPU"
            )
    return tuple(dict.fromkeys(wanted))


def _notes(plan: _trt.Plan, layers: Sequence[_trt_report.Layer], options: Options) -> tuple[str, ...]:
    notes = _trt_report.planned_memory(plan.log)
    if not layers:
        notes += ("no layer is listed: the builder named none in its log",)
    if options.sparse_weights:
        notes += (_trt_report.sparsity(plan.log),)
    if options.strip_weights:
        notes += (_trt_weights.NOTE,)
    return notes


def _member(capability: str) -> str:
    return capability.replace("sm_", "SM")
