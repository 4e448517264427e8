"""NVIDIA TensorRT 8.5 to 11 on the GPU that is here: INT8 as explicit Q/DQ, strongly typed from 10 on."""

from __future__ import annotations

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
from rdeploy.errors import ConfigError, MissingDependency, Unsupported
from rdeploy.measured import LayerTimes
from rdeploy.types import Engine, QuantScheme, Target

TITLE = "TensorRT"
INSTALL = "pip install 'rdeploy[tensorrt]'"
_NOT_HERE = (
    "TensorRT is not installed here (where JetPack or a container of NVIDIA's brings it, pip must never replace it)"
)
_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")
FLOATS = ("fp32", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(_trt_options.BuildOptions):
    """What only TensorRT has, beside what it shares with TensorRT-RTX.

    hardware_compatibility: "ampere_plus" runs on every GPU from Ampere on (not on Jetson), "same_compute_capability" on
        every GPU of the same compute capability; both cost some speed.
    dla_core: build for this DLA core of a Jetson; layers that DLA cannot run go to the GPU unless `gpu_fallback` is false.
    timing_cache: keep and use the measured times of kernels under `$RDEPLOY_CACHE/timing`.
    tactic_sources: the libraries to take kernels from, such as [CUBLAS, CUDNN] before TensorRT 11; None is the default.
    """

    hardware_compatibility: str = "none"
    dla_core: int | None = None
    gpu_fallback: bool = True
    timing_cache: bool = True
    tactic_sources: tuple[str, ...] | None = None


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
    """Build `directory/tensorrt.engine` for the GPU that is here, with `tensorrt.log` and `tensorrt.layers.json` beside it.

    Raises:
        MissingDependency: no TensorRT, or no GPU.
        Unsupported: the parser refuses a node, the profile is for another GPU, or this version lacks an option.
        StageError: the builder fails.
    """
    record = _engine.BuildRecord(onnx, directory)
    flavour, gpu = _flavour(), _gpu(target)
    trt = flavour.trt
    # DLA takes strongly typed networks from TensorRT 11 on; before, it wants the weakly typed kind with flags.
    weak = options.dla_core is not None and hasattr(trt.BuilderFlag, "FP16")
    plan = _trt.build_plan(
        flavour,
        onnx,
        directory,
        target=target,
        options=options,
        configure=lambda config: _configure(trt, config, options),
        timing=_trt_options.timing_cache_path("tensorrt", trt.__version__, gpu.name) if options.timing_cache else None,
        weak=weak,
    )
    opening = _opening(trt, options)
    _trt_opening.keep(plan.path, opening)
    layers = _layers(flavour, plan.path, opening)
    (directory / "tensorrt.layers.json").write_text(serde.dumps({"Layers": layers}))
    return record.engine(
        plan.path,
        backend="tensorrt",
        version=version(),
        device=gpu.name,
        built_for=_runs_on(gpu, options),
        fingerprint=_trt_options.fingerprint(options),
        executed_precision=_trt_report.count_precisions(_trt_report.kernels(layers)),
        notes=_notes(trt, plan, layers, options, weak=weak),
    )


def cannot_run(engine: Engine) -> str | None:
    try:
        here = version()
    except MissingDependency as error:
        return str(error)
    return _trt_session.cannot_run(engine, title=TITLE, version=here, lean=_has_lean_runtime)


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


def _configure(trt: Any, config: Any, options: Options) -> None:
    if options.hardware_compatibility not in _COMPATIBILITY:
        known = ", ".join(_COMPATIBILITY)
        raise ConfigError(f"unknown hardware_compatibility {options.hardware_compatibility!r}; there are: {known}")
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        there = hasattr(getattr(trt, "HardwareCompatibilityLevel", None), level)
        _trt_options.need(there, TITLE, trt, "hardware_compatibility")
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.tactic_sources is not None:
        config.set_tactic_sources(sum(1 << int(_tactic_source(trt, name)) for name in options.tactic_sources))
    if options.dla_core is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla_core
        if options.gpu_fallback:
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        if hasattr(trt.BuilderFlag, "FP16"):  # DLA computes in FP16 or INT8, never in FP32.
            config.set_flag(trt.BuilderFlag.FP16)


def _tactic_source(trt: Any, name: str) -> Any:
    if not hasattr(trt.TacticSource, name):
        known = ", ".join(trt.TacticSource.__members__)
        raise ConfigError(f"{TITLE} {trt.__version__} has no tactic source {name!r}; there are: {known}")
    return getattr(trt.TacticSource, name)


def _layers(flavour: _trt.Flavour, path: Path, opening: _trt_opening.Opening) -> tuple[_trt_report.Layer, ...]:
    """Return the layers of an engine that was built just now, and may therefore run its code; none where it does not open."""
    runtimes = _trt_opening.runtimes(flavour.trt, _trt.logger_of(flavour), opening, trusted=opening.host_code)
    engine = runtimes[-1].deserialize_cuda_engine(path.read_bytes())
    return _trt_report.layers_in_engine(flavour.trt, engine) if engine is not None else ()


def _has_lean_runtime(version: str) -> bool:
    """Whether the lean runtime of that version is here and loads."""
    flavour, opening = _flavour(), _trt_opening.Opening(lean_version=version)
    return _trt_opening.runtimes(flavour.trt, _trt.logger_of(flavour), opening, trusted=False)[-1] is not None


def _opening(trt: Any, options: Options) -> _trt_opening.Opening:
    needs_lean = options.version_compatible and not options.lean_runtime
    return _trt_opening.Opening(
        dla_core=options.dla_core,
        lean_version=str(trt.__version__) if needs_lean else "",
        host_code=options.lean_runtime,
        shares_profiles=_trt.decides_sharing(trt),
    )


def _runs_on(gpu: hardware.Gpu, options: Options) -> tuple[str, ...]:
    return ("sm_80+",) if options.hardware_compatibility == "ampere_plus" else (gpu.compute_capability,)


def _notes(
    trt: Any, plan: _trt.Plan, layers: Sequence[_trt_report.Layer], options: Options, *, weak: bool
) -> tuple[str, ...]:
    notes = _trt_report.planned_memory(plan.log)
    if not layers:
        notes += ("no layer is listed: TensorRT told of none in the engine that it built; see the build log",)
    if options.sparse_weights:
        notes += (_trt_report.sparsity(plan.log, layers),)
    if options.dla_core is not None:
        notes += (f"built for DLA core {options.dla_core}",)
    if weak or _trt.is_weakly_typed(trt):
        notes += ("weakly typed: where the graph allows FP16, the builder may use it for FP32 tensors too",)
    if options.strip_weights:
        notes += (_trt_weights.NOTE,)
    return notes
