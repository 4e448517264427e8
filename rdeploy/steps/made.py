"""What the steps make, and how it is written into the store and read from there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rdeploy import __version__, serde, worker
from rdeploy.results import Cost, Float16, Quantization, Verification
from rdeploy.types import Engine, OnnxModel, QuantScheme, Size

_EXPORTERS = ("torch", "onnx", "onnx-ir", "onnxscript", "timm", "torchvision", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A variant's FP32 graph and what it costs."""

    onnx: OnnxModel
    cost: Cost
    parity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A variant's INT8 graph for one scheme."""

    onnx: OnnxModel
    cost: Cost
    quantization: Quantization
    scheme: QuantScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A graph whose float layers are FP16, and what of it is not."""

    onnx: OnnxModel
    cost: Cost
    fp16: Float16


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """A variant's graph that takes uint8 pictures of the native size."""

    onnx: OnnxModel
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine, the folder it lies in, and how it did; `not_run` says why it could not be run here."""

    engine: Engine
    folder: Path
    verification: Verification | None
    not_run: str | None
    outputs: Path | None


def versions() -> list[Any]:
    """Return what a graph depends on besides the model: rdeploy itself and the packages that export it."""
    found: list[Any] = [__version__]
    for name in _EXPORTERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append([name, metadata.version(name)])
    return found


def describe(path: Path, precision: str, more: Mapping[str, Any]) -> None:
    from rdeploy import export
    from rdeploy.graph import cost

    facts = {"onnx": replace(export.describe(path, precision=precision), path=""), "cost": cost.summarize(path)}
    path.with_suffix(".json").write_text(serde.dumps({**facts, **more}))


def described(path: Path) -> tuple[OnnxModel, Cost, dict[str, Any]]:
    facts = json.loads(path.with_suffix(".json").read_text())
    onnx = replace(serde.from_json(OnnxModel, facts.pop("onnx"), where=str(path)), path=str(path))
    return onnx, serde.from_json(Cost, facts.pop("cost"), where=str(path)), facts


def resolution_of(onnx: OnnxModel) -> Size:
    return onnx.inputs[0].shape[2], onnx.inputs[0].shape[3]


def read_quantized(path: Path) -> Quantized:
    onnx, cost, more = described(path)
    quantization = serde.from_json(Quantization, more["quantization"], where=str(path))
    scheme = serde.from_json(QuantScheme, more["scheme"], where=str(path))
    return Quantized(onnx=onnx, cost=cost, quantization=quantization, scheme=scheme)


def read_rounded(path: Path) -> Rounded:
    onnx, cost, more = described(path)
    return Rounded(onnx=onnx, cost=cost, fp16=serde.from_json(Float16, more["fp16"], where=str(path)))


def read_built(folder: Path) -> Built:
    answer = json.loads((folder / worker.RESULT_FILE).read_text())["ok"]
    verification, outputs = answer["verification"], folder / "outputs.npy"
    return Built(
        engine=serde.from_json(Engine, answer["engine"], where=str(folder)),
        folder=folder / "engine",
        verification=None if verification is None else serde.from_json(Verification, verification, where=str(folder)),
        not_run=answer["not_run"],
        outputs=outputs if outputs.is_file() else None,
    )
