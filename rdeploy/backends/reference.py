"""The slow but right one: ONNX's own reference evaluator, NumPy all the way, the yardstick of the contract tests.

It is the one backend that needs the onnx package where it runs, and no runtime of anybody.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import _engine
from rdeploy.errors import ConfigError, StageError
from rdeploy.types import Engine, QuantScheme, Target, TensorInfo

INSTALL = "pip install 'rdeploy[torch]'"
OPS = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add",
    "AveragePool", "GlobalAveragePool", "MaxPool", "Concat", "Resize",
)  # fmt: skip
OUTPUT_OPS: tuple[str, ...] = ()
RESIDUAL = "all"
FLOATS = ("fp32",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The reference has nothing to choose."""


def unavailable() -> str | None:
    return _engine.missing("onnx", "onnx (the reference evaluator)", INSTALL)


def version() -> str:
    try:
        return importlib.metadata.version("onnx")
    except importlib.metadata.PackageNotFoundError:
        return str(_load("onnx").__version__)


def scheme(target: Target) -> QuantScheme:
    """Return the scheme of the CPU runtimes: Q/DQ are evaluated literally, so that any would do."""
    return QuantScheme(name="reference-u8s8", activations="uint8", ops=OPS, output_ops=OUTPUT_OPS, residual=RESIDUAL)


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Options) -> Engine:
    """Check the ONNX file and copy it to `directory/reference.onnx`.

    Raises:
        ConfigError: the file is not a model.
    """
    record = _engine.BuildRecord(onnx, directory)
    with Session(onnx):
        path = directory / "reference.onnx"
        shutil.copyfile(onnx, path)
    return record.engine(path, backend="reference", version=version(), device=hardware.cpu_model())


def cannot_run(engine: Engine) -> str | None:
    return unavailable()


def load_runtime() -> None:
    _load("onnx")
    _load("onnx.reference")


def open_session(path: Path, *, threads: int | None = None) -> Session:
    return Session(path)


class Session:
    """Evaluates the graph node by node; the number of threads is NumPy's business."""

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._evaluator: Any = None

    def __enter__(self) -> Session:
        onnx, reference = _load("onnx"), _load("onnx.reference")
        with _engine.explained(f"not an ONNX model: {self._path}", _model_errors(), ConfigError):
            model = onnx.load(str(self._path))
            onnx.checker.check_model(model)
            self._evaluator = reference.ReferenceEvaluator(model, new_ops=_older_operators(model))
        self.inputs = tuple(_info(onnx, value) for value in model.graph.input)
        self.outputs = tuple(_info(onnx, value) for value in model.graph.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._evaluator = None
        self.inputs = self.outputs = ()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        _engine.check_inputs(self.inputs, inputs)
        try:
            values = self._evaluator.run(None, dict(inputs))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise StageError("run", f"reference, {self._path}: {_engine.first_line(error)}") from error
        return {info.name: value for info, value in zip(self.outputs, values, strict=True)}


def _load(module: str) -> Any:
    return _engine.load(module, "onnx (the reference evaluator)", INSTALL)


def _older_operators(model: Any) -> list[Any]:
    """Return DequantizeLinear for opsets before 19, which the evaluator leaves out; the rule is the same."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset >= 19:
        return []

    class DequantizeLinear(_load("onnx.reference.op_run").OpRun):  # type: ignore[misc]
        op_domain = ""

        def _run(
            self, x: Any, scale: Any, zero_point: Any = None, axis: int | None = None, **_: Any
        ) -> tuple[NDArray[Any]]:
            if scale.ndim == 1 and scale.size > 1:
                along = [-1 if index == axis % x.ndim else 1 for index in range(x.ndim)]
                scale, zero_point = (
                    scale.reshape(along),
                    zero_point if zero_point is None else zero_point.reshape(along),
                )
            shifted = x.astype(np.float32) - (0 if zero_point is None else zero_point.astype(np.float32))
            return ((shifted * scale).astype(scale.dtype),)

    return [DequantizeLinear]


def _model_errors() -> tuple[type[BaseException], ...]:
    decode = _engine.load("google.protobuf.message", "protobuf", INSTALL).DecodeError
    return (decode, _load("onnx.checker").ValidationError, OSError, RuntimeError, ValueError, NotImplementedError)


def _info(onnx: Any, value: Any) -> TensorInfo:
    kind = value.type.tensor_type
    shape = tuple(n.dim_value if n.HasField("dim_value") else -1 for n in kind.shape.dim)
    return TensorInfo(name=value.name, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape=shape)
