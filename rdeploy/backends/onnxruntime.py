"""ONNX Runtime on the CPU: the engine is the ONNX file itself, optimized when a session opens."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import logging
import mmap
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import _engine, _int8_weights, _layers, _ort_cuda
from rdeploy.errors import ConfigError, StageError
from rdeploy.measured import LayerTime, LayerTimes
from rdeploy.types import Engine, QuantScheme, Target, TensorInfo

log = logging.getLogger(__name__)

INSTALL = "pip install 'rdeploy[cpu]'"
OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add",
    "AveragePool", "GlobalAveragePool", "MaxPool", "Concat", "Resize",
)  # fmt: skip
OUTPUT_OPS = ("Conv",)
"""QLinearConv writes integers: without a QuantizeLinear behind it a convolution stays in float (as it must on a float
output); QGemm and MatMulIntegerToFloat need none."""
RESIDUAL = "all"
SAFE_WEIGHT, LARGEST_SAFE = 63, 64
"""What weights of 7 bits reach, ours and other tools': 2 x 255 x 64 still fits 16 bits."""
FLOAT_QDQ = ("session.disable_quant_qdq", "1")
"""ONNX Runtime's switch for evaluating Q/DQ pairs as they stand, in float, in place of its integer kernels."""
_KERNEL = "_kernel_time"
_WARM_RUNS = 5
_INTEGER_OPS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention", "DynamicQuantize")
_DTYPES = {"float": "float32", "double": "float64"}
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}


_HARMFUL = ["MatMulAddFusion"]
"""It makes Gemm of MatMul and Add before the integer kernels are matched, and Gemm with a float bias has none: the weights
of every Linear layer would be dequantized on every run (ViT-Tiny at 160: 57 ms with it, 23 ms without)."""
FLOATS = ("fp32",)
"""The CPU kernels compute FP16 graphs in FP32, with a cast around every layer."""


CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """ONNX Runtime has nothing to choose when an engine is built."""


def unavailable() -> str | None:
    return _engine.missing("onnxruntime", "ONNX Runtime", INSTALL)


def version() -> str:
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(_load().__version__)


def scheme(target: Target) -> QuantScheme:
    """Return unsigned affine activations on x86, where signed ones run up to three times slower, signed ones on ARM.

    Without VNNI the kernels add pairs of products in 16 bits: weights of 7 bits cannot saturate there.
    """
    return QuantScheme(
        name="onnxruntime-u8s8" if hardware.is_x86() else "onnxruntime-s8s8",
        activations="uint8" if hardware.is_x86() else "int8",
        ops=OPS,
        output_ops=OUTPUT_OPS,
        residual=RESIDUAL,
        weight_max=127 if hardware.multiplies_int8_without_saturating() else SAFE_WEIGHT,
    )


def saturates(path: Path) -> bool:
    """Whether this CPU's INT8 kernels would give wrong sums for a graph: no VNNI, and weights of more than 7 bits."""
    return not hardware.multiplies_int8_without_saturating() and _int8_weights.largest_int8_weight(path) > LARGEST_SAFE


def underflows(path: Path) -> bool:
    """Whether the graph's scales are FP16: the integer kernels' steps, a product of two, would be rounded to FP16 or to 0."""
    return _is_quantized(path) and _int8_weights.holds_float16(path)


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Options) -> Engine:
    """Copy the ONNX file to `directory/onnxruntime.onnx` and run it once to see what is executed in which precision.

    Raises:
        ConfigError: the file is not a model that ONNX Runtime can load.
        StageError: it loads but does not run.
    """
    record = _engine.BuildRecord(onnx, directory)
    executed = _executed_precision(onnx, batch=target.batch_sizes[0])
    path = directory / "onnxruntime.onnx"
    shutil.copyfile(onnx, path)
    return record.engine(
        path, backend="onnxruntime", version=version(), device=hardware.cpu_model(), executed_precision=executed
    )


def cannot_run(engine: Engine) -> str | None:
    return unavailable()


def load_runtime() -> None:
    _load()


def open_session(path: Path, *, threads: int | None = None) -> Session:
    return Session(path, threads=threads)


def layer_times(
    path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 30
) -> LayerTimes:
    """Return the kernels' mean times from ONNX Runtime's own profile, with the wall clock of the same runs."""
    return profiled(path, inputs, threads=threads, runs=runs)


def profiled(
    path: Path,
    inputs: Mapping[str, NDArray[Any]],
    *,
    threads: int | None,
    runs: int,
    providers: tuple[str, ...] = (CPU,),
) -> LayerTimes:
    """Return what `layer_times` does, on the providers given."""
    with tempfile.TemporaryDirectory(prefix="rdeploy-ort-") as folder:
        prefix = str(Path(folder) / "profile")
        with Session(path, threads=threads, profile_prefix=prefix, providers=providers) as session:
            for _ in range(_WARM_RUNS):
                session.run(inputs)
            start = time.perf_counter()
            for _ in range(runs):
                session.run(inputs)
            whole_ms = (time.perf_counter() - start) * 1000.0 / runs
            events = json.loads(session.end_profiling().read_text())
    names, spent = _layers.read_names(path), _microseconds(events)
    kernels = [
        LayerTime(
            name=name,
            kind=str(facts["op_name"]),
            mean_ms=sum(times[-runs:]) / 1000.0 / runs,
            layers=names.covered(name, str(facts["op_name"])),
            precision=_precision(facts),
        )
        for name, (facts, times) in spent.items()
    ]
    return _layers.summed("ONNX Runtime's profile", kernels, whole_ms=whole_ms, runs=runs)


def _microseconds(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[dict[str, Any], list[int]]]:
    """Return, by kernel in the order of execution, what the profile says of it and the time of every run."""
    found: dict[tuple[str, str], tuple[dict[str, Any], list[int]]] = {}
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") == "Node" and "op_name" in facts and str(event["name"]).endswith(_KERNEL):
            key = str(event["name"]).removesuffix(_KERNEL), str(facts.get("node_index"))
            found.setdefault(key, (facts, []))[1].append(int(event["dur"]))
    repeated = collections.Counter(name for name, _ in found)
    return {name if repeated[name] == 1 else f"{name} #{index}": one for (name, index), one in found.items()}


class Session:
    """An ONNX Runtime session; `threads` None leaves the number to the runtime (one per physical core)."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        profile_prefix: str = "",
        providers: tuple[str, ...] = (CPU,),
    ) -> None:
        self._path, self._threads, self._profile_prefix = path, threads, profile_prefix
        self._providers = providers
        self._session: Any = None

    def __enter__(self) -> Session:
        ort = _load()
        missing = _ort_cuda.preload(ort) if self._providers[0] != CPU else ""
        options = self._session_options(ort)
        try:
            self._session = ort.InferenceSession(
                str(self._path),
                options,
                providers=list(self._providers),
                disabled_optimizers=_HARMFUL if _is_quantized(self._path) else [],
            )
        except _vendor_errors() as error:
            raise ConfigError(f"ONNX Runtime cannot load {self._path}: {_reason(error)}") from error
        if self._session.get_providers()[0] != self._providers[0]:  # it falls back to the CPU without a word
            raise StageError(
                "run",
                f"ONNX Runtime does not load its {self._providers[0]} here: {missing or '`--debug` shows its reason'}; "
                "rdeploy's extra `gpu` brings CUDA's and cuDNN's libraries",
            )
        self.inputs = tuple(_info(value) for value in self._session.get_inputs())
        self.outputs = tuple(_info(value) for value in self._session.get_outputs())
        self._names = [info.name for info in self.outputs]
        return self

    def _session_options(self, ort: Any) -> Any:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads may spin inside a run, where it is faster, but not after it: an idle session leaves the CPU to others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._providers[0] == CPU and saturates(self._path):
            log.info(
                "%s holds 8-bit weights, and this CPU has no VNNI: INT8 layers run in float, exact and slow", self._path
            )
            options.add_session_config_entry(*FLOAT_QDQ)
        elif self._providers[0] == CPU and underflows(self._path):
            options.add_session_config_entry(*FLOAT_QDQ)
        if self._profile_prefix:
            options.enable_profiling = True
            options.profile_file_prefix = self._profile_prefix
        return options

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        self.inputs = self.outputs = ()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        _engine.check_inputs(self.inputs, inputs)
        try:
            values = self._session.run(self._names, dict(inputs))
        except _vendor_errors() as error:
            raise StageError("run", f"ONNX Runtime, {self._path}: {_reason(error)}") from error
        return dict(zip(self._names, values, strict=True))

    def end_profiling(self) -> Path:
        """Write the profile and return where it is."""
        return Path(self._session.end_profiling())


def _load() -> Any:
    return _engine.load("onnxruntime", "ONNX Runtime", INSTALL)


def _vendor_errors() -> tuple[type[BaseException], ...]:
    """Return every exception that ONNX Runtime raises; they share no base class of its own."""
    state = _engine.load("onnxruntime.capi.onnxruntime_pybind11_state", "ONNX Runtime", INSTALL)
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError)


def _reason(error: BaseException) -> str:
    """Return ONNX Runtime's reason without its own preface (status code, path)."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", _engine.first_line(error))
    return re.sub(r"^Load model from .*? failed: ?", "", text)


def _info(value: Any) -> TensorInfo:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(n if isinstance(n, int) else -1 for n in value.shape)
    return TensorInfo(name=value.name, dtype=_DTYPES.get(kind, kind), shape=shape)


def _is_quantized(path: Path) -> bool:
    """Whether an ONNX file holds Q/DQ pairs, without the onnx package: operator names stand in it as they are."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"DequantizeLinear") >= 0
    except (OSError, ValueError):  # ValueError: an empty file; the session says what is wrong with either
        return False


def _executed_precision(path: Path, *, batch: int) -> tuple[tuple[str, int], ...]:
    """Run once with profiling on and count the kernels by what they computed in; Q/DQ pairs that stayed count apart."""
    with (
        tempfile.TemporaryDirectory(prefix="rdeploy-ort-") as folder,
        Session(path, profile_prefix=str(Path(folder) / "profile")) as session,
    ):
        session.run(_engine.zeros(session.inputs, batch=batch))
        events = json.loads(session.end_profiling().read_text())
    kernels = [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})]
    return tuple(sorted(collections.Counter(_precision(kernel) for kernel in kernels).items()))


def _precision(kernel: dict[str, Any]) -> str:
    operator = str(kernel["op_name"])
    if operator in ("QuantizeLinear", "DequantizeLinear"):
        return "quantize"
    if operator.startswith(_INTEGER_OPS):
        return "int8"
    shapes = kernel.get("input_type_shape") or kernel.get("output_type_shape") or [{}]
    return _PRECISIONS.get(next(iter(shapes[0]), ""), "other")
