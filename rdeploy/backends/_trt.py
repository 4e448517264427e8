"""Build with a TensorRT, whichever: an ONNX file and the `trt` module go in, a serialized engine and its log come out.

TensorRT 10.3 to 11 and TensorRT-RTX share this code. Precision lives in the graph (explicit Q/DQ, strong typing); no
builder flag that TensorRT 11 removed is ever touched there. TensorRT 8.x has weak typing only: the precisions that the parsed
graph holds are allowed with the flags that it needs (INT8, FP16).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy.backends import _layers, _trt_options, _trt_weights
from rdeploy.errors import ConfigError, MissingDependency, StageError, Unsupported
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
    ("within workspace limit", "allow more with backend_options: workspace_mb, or leave it out"),
    (
        "libnvinfer_lean",
        "lean_runtime needs TensorRT's lean runtime library; without it the engine is built all the same",
    ),
    (
        "graph_jit.cpp",
        "engines that can be refitted, or hold no weights, need a GPU and its driver when they are built",
    ),
    ("Could not find any implementation", "no kernel of this version runs that layer there: see the build log"),
)
_UNSIGNED = re.compile(r"(\S*) \[QuantizeLinear\] inputs: .*\[UINT8\]")
_TOLD = 5
"""How many refused nodes are told in one message."""
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
    """Whether to keep a verbose message: the kernels, sparsity, unsigned Q/DQ; all of them would be megabytes."""
    return message.startswith(("Layers:", "(Sparsity)")) or _UNSIGNED.match(message) is not None


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
    flavour: Flavour,
    onnx: Path,
    directory: Path,
    *,
    target: Target,
    options: _trt_options.BuildOptions,
    configure: Callable[[Any], None],
    timing: Path | None = None,
    weak: bool = False,
) -> Plan:
    """Parse, configure, build; write `directory/NAME.engine` and `directory/NAME.log`.

    Args:
        configure: sets on the config what only this flavour has.
        timing: the file of the timing cache.
        weak: build a weakly typed network even where a strongly typed one could be (DLA before TensorRT 11).

    Raises:
        ConfigError: the file is not an ONNX model.
        Unsupported: the parser refuses a node, a dimension other than the batch is dynamic, an input or output has a type
            that NumPy lacks, or the version lacks an option.
        StageError: the builder fails.
    """
    trt, logger = flavour.trt, logger_of(flavour)
    with recorded(logger, directory / f"{flavour.name}.log") as lines:
        builder = _builder(flavour, logger)
        network = builder.create_network(network_flags(trt, weak=weak))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx)):
            raise refusal(flavour, parser, onnx)
        if network.num_outputs == 0:  # The parser takes some files that are no model for an empty one.
            raise ConfigError(f"{flavour.title} cannot read {onnx}: not an ONNX model, or one without outputs")
        refuse_unsigned(flavour, lines, onnx)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        _trt_options.configure(flavour.title, trt, config, options)
        configure(config)
        if is_weakly_typed(trt) or weak:
            allow_precisions(trt, network, config)
        if decides_sharing(trt):
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        ranges = _trt_options.batch_ranges(options, target.batch_sizes)
        inputs, _ = _tensors(flavour, network)
        _trt_options.add_optimization_profiles(builder, config, inputs, ranges)
        with _trt_options.timing_cache(config, timing):
            serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            reason = f"{flavour.title} cannot build {onnx.name}: {last_error(lines)}"
            located = _layers.read_names(onnx).located(reason)
            raise StageError("build", _with_hint(f"{reason}; {located}" if located else reason))
        path = directory / f"{flavour.name}.engine"
        path.write_bytes(serialized)
        if options.strip_weights:
            _trt_weights.keep(onnx, path)
    return Plan(path, tuple(lines))


def _builder(flavour: Flavour, logger: Any) -> Any:
    """Return a builder.

    Raises:
        MissingDependency: there is no driver, or it is too old: the bindings say no more than that they got nothing.
    """
    try:
        return flavour.trt.Builder(logger)
    except TypeError as error:
        reason = " ".join(str(logger.recent[-1][1]).split()) if logger.recent else str(error)
        raise MissingDependency(
            f"{flavour.title} makes no builder without an NVIDIA driver that fits: {reason}"
        ) from error


def is_weakly_typed(trt: Any) -> bool:
    """Whether this version has no strongly typed networks (TensorRT 8.x, 9.0)."""
    return not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") and hasattr(trt.BuilderFlag, "INT8")


def decides_sharing(trt: Any) -> bool:
    """Whether this version decides when it builds that contexts may share a profile: 8.6; later ones share, 8.5 cannot."""
    return is_weakly_typed(trt) and hasattr(getattr(trt, "PreviewFeature", None), "PROFILE_SHARING_0806")


def network_flags(trt: Any, *, weak: bool = False) -> int:
    """Return the creation flags that this version has and needs: explicit batch is gone in 11, strong typing implied."""
    flags = trt.NetworkDefinitionCreationFlag
    names = ("EXPLICIT_BATCH",) if weak else ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    return sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name))


def allow_precisions(trt: Any, network: Any, config: Any) -> None:
    """Allow what a weakly typed network holds: INT8 where it quantizes, FP16 where a tensor is FP16.

    An FP32 graph stays FP32. Where FP16 is allowed the builder may use it for FP32 tensors too; that is weak typing.
    """
    quantizes = half = False
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        quantizes |= layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE)
        half |= any(layer.get_output(i).dtype == trt.DataType.HALF for i in range(layer.num_outputs))
    if quantizes:
        config.set_flag(trt.BuilderFlag.INT8)
    if half:
        config.set_flag(trt.BuilderFlag.FP16)


def refusal(flavour: Flavour, parser: Any, onnx: Path) -> ConfigError | Unsupported:
    """Return the parser's complaints as one exception that names the layers of the user's model."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    named = [error for error in errors if error.node() >= 0]
    if not named:
        reason = f": {_reason(errors[0])}" if errors else ""
        return ConfigError(f"{flavour.title} cannot read {onnx}{reason}")
    names = _layers.read_names(onnx)
    told = list(dict.fromkeys(f"node {_node(error, names)} of {onnx.name}: {_reason(error)}" for error in named))
    more = f" (and {len(told) - _TOLD} more)" if len(told) > _TOLD else ""
    return Unsupported(_with_hint(f"{flavour.title} refuses {'; '.join(told[:_TOLD])}{more}"))


def _reason(error: Any) -> str:
    return re.sub(r"^Assertion failed: .*?: ", "", str(error.desc()).strip())


def _node(error: Any, names: _layers.Names) -> str:
    """Return `'node_Conv_7' (Conv), in layer1.0.conv1`; TensorRT 8.x knows only the number, the graph the rest."""
    number, name, operator = error.node(), _call(error, "node_name"), _call(error, "node_operator")
    node = names.by_name.get(name) or (
        names.nodes[number] if not name and number < len(names.nodes) else _layers.Node()
    )
    name, operator = name or node.name, operator or node.op_type
    where = f", in {node.module}," if node.module else ""
    return (repr(name) if name else f"number {number}") + (f" ({operator})" if operator else "") + where


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


def _tensors(flavour: Flavour, network: Any) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Return the inputs and the outputs of a network."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    told = [tuple(tensor_info(flavour, t.name, t.dtype, t.shape) for t in tensors) for tensors in (inputs, outputs)]
    return told[0], told[1]


def tensor_info(flavour: Flavour, name: str, dtype: Any, shape: Iterable[int]) -> TensorInfo:
    """Return a TensorRT tensor's name, dtype and shape in NumPy's words.

    Raises:
        Unsupported: NumPy has no such type (BF16, FP8): nothing here could feed or read it.
    """
    try:
        known = flavour.trt.nptype(dtype)
    except TypeError as error:
        kind = getattr(dtype, "name", str(dtype))
        raise Unsupported(
            f"{flavour.title}: the tensor {name!r} is {kind}, a type that NumPy does not have; "
            "export the model with inputs and outputs in FP32 or FP16",
            stage="build",
        ) from error
    return TensorInfo(name=name, dtype=known.__name__, shape=tuple(int(n) for n in shape))
