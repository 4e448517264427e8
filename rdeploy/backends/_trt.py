"""Build with a TensorRT, whichever: an ONNX file and the `trt` module go in, a serialized engine and its log come out.

TensorRT 10.3 to 11 and TensorRT-RTX share this code. Precision lives in the graph (explicit Q/DQ, strong typing); no
builder flag that TensorRT 11 removed is ever touched.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy.backends import _engine
from rdeploy.errors import ConfigError, StageError, Unsupported
from rdeploy.types import QuantScheme, Target, TensorInfo

OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add",
    "AveragePool", "GlobalAveragePool", "MaxPool", "Concat", "Resize",
)  # fmt: skip
OUTPUT_OPS: tuple[str, ...] = ()
RESIDUAL = "branch"
SCHEME = QuantScheme(name="tensorrt-s8", activations="int8", ops=OPS, output_ops=OUTPUT_OPS, residual=RESIDUAL)
"""INT8 in the TensorRT family: signed, zero point 0, activations per tensor, weights per channel."""

_HINTS = (
    ("Non-zero zero point", "TensorRT takes symmetric INT8 only: quantize for this backend, not for a CPU runtime"),
    ("FP32 GEMM is not supported", "Turing (sm_75) has no FP32 matrix product there: build FP16, or leave sm_75 out"),
    ("must have type FP8", "TensorRT takes no INT32 DequantizeLinear: leave the biases in floating point"),
)
_DATA_TYPES = (
    ("int8", "int8"), ("bf16", "bf16"), ("bfloat", "bf16"), ("fp16", "fp16"), ("half", "fp16"),
    ("fp32", "fp32"), ("float", "fp32"),
)  # fmt: skip
"""A word in what TensorRT calls a data type ("Row major Int8 format", "Half"), and the precision that it means."""
_UNSIGNED = re.compile(r"(\S*) \[QuantizeLinear\] inputs: .*\[UINT8\]")
_INFO = 3  # Severity: 0 internal error, 1 error, 2 warning, 3 info, 4 verbose


@dataclass(frozen=True, slots=True)
class Flavour:
    """One TensorRT: its name as a backend, its name for people, its Python module."""

    name: str
    title: str
    trt: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """A built engine's file and what the builder told about it."""

    path: Path
    log: tuple[tuple[int, str], ...]


def logger_of(flavour: Flavour) -> Any:
    """Return this TensorRT's one ILogger: while any builder or runtime lives, TensorRT ignores every later logger.

    Its `recent` are the last warnings and errors, as (severity, text).
    """
    return _make_logger(flavour.trt)


@functools.cache
def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.recent: collections.deque[tuple[int, str]] = collections.deque(maxlen=50)
            self.recordings: list[list[tuple[int, str]]] = []

        def log(self, severity: Any, message: str) -> None:
            line = (int(severity), message)
            if line[0] < _INFO:
                self.recent.append(line)
            if line[0] <= _INFO or _is_of_use(message):
                for recording in self.recordings:
                    recording.append(line)

    return Logger()


def _is_of_use(message: str) -> bool:
    """Whether to keep a verbose message: the list of kernels, and unsigned Q/DQ; all of them would be megabytes."""
    return message.startswith("Layers:") or _UNSIGNED.match(message) is not None


@contextlib.contextmanager
def recorded(logger: Any, path: Path) -> Iterator[list[tuple[int, str]]]:
    """Collect what is logged in the block, and write it to `path` at its end, however it ends."""
    lines: list[tuple[int, str]] = []
    logger.recordings.append(lines)
    try:
        yield lines
    finally:
        logger.recordings.remove(lines)
        path.write_text("".join(f"{severity} {message}\n" for severity, message in lines))


def build_plan(
    flavour: Flavour, onnx: Path, directory: Path, *, target: Target, configure: Callable[[Any], None]
) -> Plan:
    """Parse, configure, build; write `directory/NAME.engine` and `directory/NAME.log`.

    `configure(config)` sets what this flavour and its options ask for.

    Raises:
        ConfigError: the file is not an ONNX model.
        Unsupported: the parser refuses a node, or a dimension other than the batch is dynamic.
        StageError: the builder fails.
    """
    trt, logger = flavour.trt, logger_of(flavour)
    with recorded(logger, directory / f"{flavour.name}.log") as lines:
        builder = trt.Builder(logger)
        network = builder.create_network(network_flags(flavour))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx)):
            raise refusal(flavour, parser, onnx)
        if network.num_outputs == 0:  # The parser takes some files that are no model for an empty one.
            raise ConfigError(f"{flavour.title} cannot read {onnx}: not an ONNX model, or one without outputs")
        refuse_unsigned(flavour, lines, onnx)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        configure(config)
        add_shape_range(builder, config, _inputs(flavour, network), target.batch_sizes)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            reason = f"{flavour.title} cannot build {onnx.name}: {last_error(lines)}"
            raise StageError("build", _with_hint(reason))
        path = directory / f"{flavour.name}.engine"
        path.write_bytes(serialized)
    return Plan(path, tuple(lines))


def network_flags(flavour: Flavour) -> int:
    """Return the creation flags that this version has and needs: explicit batch is gone in 11, strong typing implied.

    Raises:
        Unsupported: a version before strong typing (TensorRT 8.x, 9.0).
    """
    flags = flavour.trt.NetworkDefinitionCreationFlag
    if not hasattr(flags, "STRONGLY_TYPED") and hasattr(flavour.trt.BuilderFlag, "INT8"):
        raise Unsupported(
            f"{flavour.title} {flavour.trt.__version__} has no strongly typed networks; "
            "rdeploy needs TensorRT 10.3 or later"
        )
    return sum(1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name))


def refusal(flavour: Flavour, parser: Any, onnx: Path) -> ConfigError | Unsupported:
    """Return the parser's first complaint as an exception that names the ONNX node."""
    if parser.num_errors == 0:
        return ConfigError(f"{flavour.title} cannot read {onnx}")
    error = parser.get_error(0)
    reason = re.sub(r"^Assertion failed: .*?: ", "", str(error.desc()).strip())
    if error.node() < 0:
        return ConfigError(f"{flavour.title} cannot read {onnx}: {reason}")
    name = _call(error, "node_name") or f"number {error.node()}"
    operator = _call(error, "node_operator")
    kind = f" ({operator})" if operator else ""
    return Unsupported(_with_hint(f"{flavour.title} refuses node {name!r}{kind} of {onnx.name}: {reason}"))


def refuse_unsigned(flavour: Flavour, log: Iterable[tuple[int, str]], onnx: Path) -> None:
    """Refuse UINT8 with zero point 0: the parser takes it for INT8, and the upper half of the range would saturate.

    Raises:
        Unsupported: a node quantizes to UINT8.
    """
    found = next((match for _, message in log if (match := _UNSIGNED.match(message))), None)
    if found is not None:
        hint = "quantize for this backend, not for a CPU runtime"
        raise Unsupported(f"{flavour.title} would take node {found[1]!r} of {onnx.name} for signed INT8; {hint}")


def _call(error: Any, name: str) -> str:
    method = getattr(error, name, None)
    return str(method()) if method is not None else ""


def _with_hint(message: str) -> str:
    hint = next((hint for fragment, hint in _HINTS if fragment in message), "")
    return f"{message} ({hint})" if hint else message


def last_error(lines: Iterable[tuple[int, str]]) -> str:
    """Return the last error in one line, without the vendor's source positions."""
    errors = [message for severity, message in lines if severity <= 1]
    text = " ".join(errors[-1].split()) if errors else "no reason given"
    text = re.sub(r"^\S+::\S+: Error Code \d+: ", "", text)
    return re.sub(r"\s*In \w+ at /\S+?:\d+", "", text)


def _inputs(flavour: Flavour, network: Any) -> tuple[TensorInfo, ...]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return tuple(tensor_info(flavour, t.name, t.dtype, t.shape) for t in tensors)


def tensor_info(flavour: Flavour, name: str, dtype: Any, shape: Iterable[int]) -> TensorInfo:
    """Return a TensorRT tensor's name, dtype and shape in NumPy's words."""
    return TensorInfo(name=name, dtype=flavour.trt.nptype(dtype).__name__, shape=tuple(int(n) for n in shape))


def add_shape_range(builder: Any, config: Any, inputs: Sequence[TensorInfo], batch_sizes: Sequence[int]) -> None:
    """Let a dynamic batch range from the smallest to the largest of `batch_sizes`, tuned for the first of them.

    Raises:
        Unsupported: another dimension is dynamic.
    """
    _engine.check_only_batch_is_dynamic(inputs)
    dynamic = [info for info in inputs if -1 in info.shape]
    if not dynamic:
        return
    shape_range = builder.create_optimization_profile()
    for info in dynamic:
        batches = (min(batch_sizes), batch_sizes[0], max(batch_sizes))
        shape_range.set_shape(info.name, *((batch, *info.shape[1:]) for batch in batches))
    config.add_optimization_profile(shape_range)


def set_options(trt: Any, config: Any, *, workspace_mb: int | None, sparse_weights: bool, tf32: bool) -> None:
    """Set the options that both TensorRTs have. A workspace of None means all of the device's memory."""
    if workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    if sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)


def kernels_in_log(log: Iterable[tuple[int, str]]) -> tuple[tuple[str, str], ...]:
    """Return (kind, data type of the first input) of every kernel in the list that TensorRT-RTX logs after a build."""
    text = next((message for _, message in log if message.startswith("Layers:")), "")
    pattern = re.compile(
        r"^Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], (?:Constants|Outputs): \[(.*)$", re.MULTILINE
    )
    found = []
    for kind, inputs, rest in pattern.findall(text):
        types = re.findall(r"Data[tT]ype: (\w+)", inputs) or re.findall(r"Data[tT]ype: (\w+)", rest)
        found.append((kind, types[0] if types else ""))
    return tuple(found)


def kernels_in_engine(flavour: Flavour, engine: Any) -> tuple[tuple[str, str], ...]:
    """Return (kind, data type of the first input) of every layer, as the engine inspector tells."""
    inspector = engine.create_engine_inspector()
    told = json.loads(inspector.get_engine_information(flavour.trt.LayerInformationFormat.JSON))
    found = []
    for layer in told.get("Layers", ()):
        if isinstance(layer, dict):
            tensor: dict[str, Any] = next(iter([*layer.get("Inputs", ()), *layer.get("Outputs", ())]), {})
            # TensorRT 11 split "Format/Datatype" in two.
            data_type = next((str(v) for k, v in tensor.items() if "datatype" in k.lower()), "")
            found.append((str(layer.get("LayerType", "")), data_type))
    return tuple(found)


def count_precisions(kernels: Iterable[tuple[str, str]]) -> tuple[tuple[str, int], ...]:
    """Count kernels by what they compute in; element-wise code made for the network and reformats count apart."""
    counts = collections.Counter(_precision(kind, data_type) for kind, data_type in kernels)
    return tuple(sorted(counts.items()))


def _precision(kind: str, data_type: str) -> str:
    if kind == "kgen":
        return "generated"
    if kind.lower() == "reformat":
        return "reorder"
    text = data_type.lower()
    return next((name for word, name in _DATA_TYPES if word in text), "other")


def planned_memory(log: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """Return the builder's own account of weights and activations, as sentences."""
    pattern = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
    found = [pattern.search(message) for _, message in log]
    return tuple(f"the builder plans {int(m[2])} bytes of {m[1].lower()} memory" for m in found if m)
