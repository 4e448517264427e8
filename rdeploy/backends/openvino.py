"""OpenVINO on the CPU: the engine is OpenVINO's own IR, an `.xml` with its `.bin` beside it."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import _engine, _layers
from rdeploy.errors import ConfigError, StageError
from rdeploy.measured import LayerTime, LayerTimes
from rdeploy.types import Engine, QuantScheme, Target, TensorInfo

INSTALL = "pip install 'rdeploy[cpu]'"
OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add",
    "AveragePool", "GlobalAveragePool", "MaxPool", "Concat", "Resize",
)  # fmt: skip
OUTPUT_OPS: tuple[str, ...] = ()
RESIDUAL = "all"
_NOT_LAYERS = ("Input", "Output", "Const", "Result", "Reshape")
_WARM_RUNS = 5
_INTERNAL = re.compile(r"^[A-Z][A-Za-z]+_\d+$")
"""Names that OpenVINO itself gives: `Multiply_23851`."""
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
FLOATS = ("fp32",)
"""FP16 is a storage format on CPUs; where there is bf16 OpenVINO computes FP32 graphs in it, if that is faster."""
_INFERENCE_PRECISIONS = ("auto", "f32", "bf16", "f16")
_MARK = ["rdeploy", "inference_precision"]
"""Where the IR says in what its float layers are computed."""
_FASTER = 0.9
"""Rounding harder has to pay: a tenth of the latency at least, which two engines built at once do not feign."""
_TRIAL_ROUNDS, _TRIAL_S = 15, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`inference_precision`: what float layers are computed in: f32, bf16, f16, or auto, whichever is faster on this machine.

    Left to itself OpenVINO takes bf16 wherever the CPU has it. Without AMX that is slower: ViT-S/14 takes 96 ms on a Xeon with
    AVX-512 BF16, and 49 ms in f32.

    Raises:
        ConfigError: it is none of them.
    """

    inference_precision: str = "auto"

    def __post_init__(self) -> None:
        if self.inference_precision not in _INFERENCE_PRECISIONS:
            raise ConfigError(
                f"inference_precision {self.inference_precision!r}: there are {', '.join(_INFERENCE_PRECISIONS)}"
            )


def unavailable() -> str | None:
    return _engine.missing("openvino", "OpenVINO", INSTALL)


def version() -> str:
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return str(_load().__version__)


def scheme(target: Target) -> QuantScheme:
    """Return unsigned affine activations on x86, signed ones on ARM; weights of 7 bits where the CPU has no VNNI."""
    return QuantScheme(
        name="openvino-u8s8" if hardware.is_x86() else "openvino-s8s8",
        activations="uint8" if hardware.is_x86() else "int8",
        ops=OPS,
        output_ops=OUTPUT_OPS,
        residual=RESIDUAL,
        weight_max=127 if hardware.multiplies_int8_without_saturating() else 63,
        integer_attention=hardware.is_x86(),
        joined_tokens=False,  # it moves the rounding across the Concat, takes tokens for channels, and cannot load that (CvT)
    )


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Options) -> Engine:
    """Convert the ONNX file to `directory/openvino.xml` and `.bin`, and ask the compiled model what it executes.

    The weights keep their type: compressing them to FP16 would change an FP32 baseline. What float layers are computed in is
    tried where the CPU leaves a choice, and written into the IR.

    Raises:
        ConfigError: the file is not a model that OpenVINO can convert.
    """
    record = _engine.BuildRecord(onnx, directory)
    openvino = _load()
    path = directory / "openvino.xml"
    with _engine.explained(f"OpenVINO cannot convert {onnx}", (RuntimeError,), ConfigError):
        model = openvino.Core().read_model(str(onnx))
        openvino.save_model(model, str(path), compress_to_fp16=False)
        precision = _inference_precision(path, target.batch_sizes[0], options)
        model.set_rt_info(precision, _MARK)
        openvino.save_model(model, str(path), compress_to_fp16=False)
    with Session(path) as session:
        session.run(_engine.zeros(session.inputs, batch=target.batch_sizes[0]))
        executed = session.executed_precision()
    return record.engine(
        path, backend="openvino", version=version(), device=hardware.cpu_model(), executed_precision=executed
    )


def cannot_run(engine: Engine) -> str | None:
    return unavailable()


def load_runtime() -> None:
    # Asking the CPU for its name loads its plugin, where the kernels are.
    _load().Core().get_property("CPU", "FULL_DEVICE_NAME")


def open_session(path: Path, *, threads: int | None = None) -> Session:
    return Session(path, threads=threads)


def layer_times(
    path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 30
) -> LayerTimes:
    """Return the kernels' mean times from OpenVINO's own counters, with the wall clock of the same runs."""
    with Session(path, threads=threads, count_time=True) as session:
        for _ in range(_WARM_RUNS):
            session.run(inputs)
        before = {name: mean_ms for name, _, _, mean_ms in session.kernel_times()}
        start = time.perf_counter()
        for _ in range(runs):
            session.run(inputs)
        whole_ms = (time.perf_counter() - start) * 1000.0 / runs
        after = session.kernel_times()
        covered = session.covered_layers()
    # The counters are means over all runs: what the warm-up had in them is taken out.
    every = _WARM_RUNS + runs
    kernels = [
        LayerTime(
            name=name,
            kind=kind,
            mean_ms=max(0.0, mean_ms * every - before.get(name, 0.0) * _WARM_RUNS) / runs,
            layers=covered.get(name, ()),
            precision=_precision(kernel, ()),
            kernel=kernel,
        )
        for name, kind, kernel, mean_ms in after
    ]
    return _layers.summed("OpenVINO's performance counters", kernels, whole_ms=whole_ms, runs=runs)


class Session:
    """One inference request at the lowest latency; `threads` None leaves the number to the runtime.

    Float layers are computed in what the IR says, and in OpenVINO's own choice where it says nothing or this CPU has not that;
    `executed_precision` tells what came of it.
    """

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(
        self, path: Path, *, threads: int | None = None, count_time: bool = False, precision: str | None = None
    ) -> None:
        self._path, self._threads, self._count_time = path, threads, count_time
        self._precision = precision
        self._compiled: Any = None
        self._request: Any = None
        self._tensor: Any = None
        self._fed: dict[int, NDArray[Any]] = {}

    def __enter__(self) -> Session:
        openvino = _load()
        _check_is_ir(self._path)
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self._count_time:
            settings["PERF_COUNT"] = True
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        with _engine.explained(f"OpenVINO cannot load {self._path}", (RuntimeError,), ConfigError):
            core = openvino.Core()
            model = core.read_model(str(self._path))
            asked = self._precision or (str(model.get_rt_info(_MARK).value) if model.has_rt_info(_MARK) else "")
            if asked in _can_compute(core):
                settings["INFERENCE_PRECISION_HINT"] = asked
            self._compiled = core.compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._tensor = openvino.Tensor
        self.inputs = tuple(_info(port) for port in self._compiled.inputs)
        self.outputs = tuple(_info(port) for port in self._compiled.outputs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request = self._compiled = None
        self._fed.clear()
        self.inputs = self.outputs = ()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        _engine.check_inputs(self.inputs, inputs)
        try:
            # Tensors over the arrays' own memory: half of what `infer(inputs)` costs around a run.
            for index, info in enumerate(self.inputs):
                array = np.ascontiguousarray(inputs[info.name])
                if array is not self._fed.get(index):
                    self._fed[index] = array
                    self._request.set_input_tensor(index, self._tensor(array, shared_memory=True))
            self._request.infer()
        except RuntimeError as error:
            raise StageError("run", f"OpenVINO, {self._path}: {_engine.first_line(error)}") from error
        outputs = ((info.name, self._request.get_output_tensor(index)) for index, info in enumerate(self.outputs))
        return {name: tensor.data.copy() for name, tensor in outputs}

    @property
    def threads(self) -> int:
        """How many threads the compiled model uses."""
        return int(self._compiled.get_property("INFERENCE_NUM_THREADS"))

    def kernel_times(self) -> list[tuple[str, str, str, float]]:
        """Return name, kind, kernel and mean milliseconds of what the runs so far executed; needs `count_time`."""
        return [
            (one.node_name, one.node_type, one.exec_type, one.real_time.total_seconds() * 1000.0)
            for one in self._request.get_profiling_info()
            if one.status.name == "EXECUTED"
        ]

    def covered_layers(self) -> dict[str, tuple[str, ...]]:
        """Return, by kernel, the model's layers that it covers, the one that it is named after first."""
        found = {}
        for layer in self._compiled.get_runtime_model().get_ordered_ops():
            name = layer.get_friendly_name()
            texts = _text(layer.get_rt_info(), "originalLayersNames").split(",")
            kept = dict.fromkeys(_layers.plain(text) for text in texts if text and not _INTERNAL.match(text))
            main = _layers.plain(name)
            found[name] = tuple([one for one in kept if one == main] + [one for one in kept if one != main])
        return found

    def executed_precision(self) -> tuple[tuple[str, int], ...]:
        """Count the layers of the compiled model by what their kernels compute in; reorders count apart."""
        counts: collections.Counter[str] = collections.Counter()
        for layer in self._compiled.get_runtime_model().get_ordered_ops():
            facts = layer.get_rt_info()
            kind = _text(facts, "layerType")
            if kind == "Reorder":
                counts["reorder"] += 1
            elif kind not in _NOT_LAYERS:
                counts[_precision(_text(facts, "primitiveType"), _input_types(layer))] += 1
        return tuple(sorted(counts.items()))


def _inference_precision(path: Path, batch: int, options: Options) -> str:
    """Return what the float layers of a model are computed in: what was asked for, or the faster one, f32 in doubt.

    Raises:
        ConfigError: this CPU does not compute in what was asked for.
    """
    asked, can = options.inference_precision, _can_compute(_load().Core())
    if asked not in ("auto", *can):
        raise ConfigError(f"inference_precision {asked}: this CPU computes in {', '.join(can)}")
    own_choice = "bf16" if hardware.is_x86() else "f16"
    if asked != "auto" or own_choice not in can:
        return asked if asked != "auto" else "f32"
    times = _raced(path, batch, ("f32", own_choice))
    return own_choice if times[own_choice] < _FASTER * times["f32"] else "f32"


def _raced(path: Path, batch: int, precisions: Sequence[str]) -> dict[str, float]:
    """Return the least seconds that a model took in each of these precisions, a run of each in turn."""
    with contextlib.ExitStack() as opened:
        sessions = {name: opened.enter_context(Session(path, precision=name)) for name in precisions}
        inputs = _engine.zeros(next(iter(sessions.values())).inputs, batch=batch)
        best = dict.fromkeys(precisions, math.inf)
        end = time.perf_counter() + _TRIAL_S
        for index in range(_WARM_RUNS + _TRIAL_ROUNDS):
            if index > _WARM_RUNS and time.perf_counter() > end:
                break
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(inputs)
                spent = time.perf_counter() - start
                best[name] = min(best[name], spent) if index >= _WARM_RUNS else best[name]
    return best


def _can_compute(core: Any) -> tuple[str, ...]:
    """Return the float types that OpenVINO's CPU plugin computes in here, of f32, bf16 and f16."""
    known = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", *(name.lower().replace("fp", "f") for name in ("BF16", "FP16") if name in known))


def _load() -> Any:
    return _engine.load("openvino", "OpenVINO", INSTALL)


def _check_is_ir(path: Path) -> None:
    """Refuse what is not XML before OpenVINO tries every format that it knows on it."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        raise ConfigError(f"cannot read the engine {path}: {error.strerror}") from error
    if not start.startswith(b"<"):
        raise ConfigError(f"OpenVINO cannot load {path}: not an OpenVINO IR; build the engine again")


def _info(port: Any) -> TensorInfo:
    shape = tuple(n.get_length() if n.is_static else -1 for n in port.get_partial_shape())
    return TensorInfo(name=port.get_any_name(), dtype=np.dtype(port.get_element_type().to_dtype()).name, shape=shape)


def _text(facts: Any, key: str) -> str:
    value = dict(facts).get(key, "")
    return str(value.astype(str) if hasattr(value, "astype") else value)


def _input_types(layer: Any) -> list[str]:
    return [layer.get_input_element_type(index).get_type_name() for index in range(layer.get_input_size())]


def _precision(primitive: str, input_types: Sequence[str]) -> str:
    """Return the precision that ends a primitive's name (`brgconv_avx512_I8`, `jit_avx512_bf16`).

    Arithmetic on shapes (i32, with u8 for booleans) runs in kernels of the same name as INT8, and is not it.
    """
    match = re.search(r"_(f32|f16|bf16|i8|u8)$", primitive.lower())
    if match is None or {"i32", "i64"} & set(input_types):
        return "other"
    return _PRECISIONS[match.group(1)]
