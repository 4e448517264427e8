"""Engines without weights: a small file beside the engine names the ONNX file whose weights it takes when it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rdeploy import serde
from rdeploy.errors import ConfigError, StageError

NOTE = "weights were stripped: they are put back from model.onnx when the engine is opened"
_SUFFIX = ".refit"


def keep(onnx: Path, engine: Path) -> None:
    """Write `ENGINE.refit`, and leave the ONNX file beside the engine; a bundle has it already, as its portable graph."""
    engine.with_name(engine.name + _SUFFIX).write_text(serde.dumps({"onnx_sha256": serde.file_sha256(onnx)}))
    if onnx.resolve() != (engine.parent / "model.onnx").resolve():
        shutil.copyfile(onnx, engine.parent / "model.onnx")


def put_back(trt: Any, logger: Any, engine: Any, path: Path) -> None:
    """Refit an engine that was built without weights; any other is left as it is.

    Raises:
        ConfigError: the ONNX file that it was built from is not there, or is another one.
        StageError: TensorRT refuses its weights.
    """
    sidecar = path.with_name(path.name + _SUFFIX)
    if not sidecar.is_file():
        return
    onnx = _source(path, json.loads(sidecar.read_text())["onnx_sha256"])
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
        raise StageError("run", f"{path}: the weights of {onnx} do not fit; build the engine again")


def _source(path: Path, sha256: str) -> Path:
    bundle = path.parent.parent.parent
    places = [path.parent / "model.onnx", bundle / "model.onnx", *sorted((bundle / "graphs").glob("*.onnx"))]
    for place in places:
        if place.is_file() and serde.file_sha256(place) == sha256:
            return place
    raise ConfigError(
        f"{path} was built without weights, and the ONNX file that holds them is not in its bundle; copy the bundle again"
    )
