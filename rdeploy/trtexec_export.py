"""What `trtexec` exported (`--exportTimes`, `--exportProfile`, `--exportLayerInfo`) goes in, a `Measurement` comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdeploy import trtexec
from rdeploy.backends import _trt_layers, _trt_report
from rdeploy.errors import ConfigError
from rdeploy.measured import LayerTime, LayerTimes, Measurement, Memory
from rdeploy.results import EngineResult

NAME = "tensorrt (trtexec)"
DEFINITION = "GPU time of one inference between two CUDA events, as trtexec measured it; no copies, no host"
_LARGEST_BYTES = 256 << 20


def measurement(
    times: Path, *, batch: int, profile: Path | None = None, information: Path | None = None
) -> Measurement:
    """Read the times of every inference, of every layer where there is a profile, and what the layers compute in.

    Raises:
        ConfigError: a file is not what trtexec writes.
    """
    rows, known = _rows(times), () if information is None else layer_information(information)
    found = [float(row["computeMs"]) for row in rows if isinstance(row.get("computeMs"), (int, float))]
    if not found or len(found) < len(rows) or min(found) <= 0:
        raise ConfigError(f"{times}: not the times of `trtexec --exportTimes`: it has no computeMs in every row")
    return Measurement(
        batch=batch,
        threads=None,
        latencies_ms=tuple(found),
        warmup=0,
        stable=True,
        memory=Memory(weights=None, activations=None, workspace=None, process_peak=None),
        definition=DEFINITION,
        device_latencies_ms=tuple(found),
        device_clock="CUDA events, by trtexec",
        layers=None if profile is None else layers(profile, known),
        notes=("measured by trtexec, which warms up before it exports; it says nothing of memory", *_executed(known)),
    )


def _executed(known: Sequence[_trt_report.Layer]) -> tuple[str, ...]:
    counts = _trt_report.count_precisions(_trt_report.kernels(known))
    return (f"executed: {', '.join(f'{count} {precision}' for precision, count in counts)}",) if counts else ()


def layer_information(path: Path) -> tuple[_trt_report.Layer, ...]:
    """Read what the engine's inspector says of every layer; names only where the engine was built to hold no more.

    Raises:
        ConfigError: the file is not what trtexec writes.
    """
    content = _content(path)
    rows = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: not the layers of `trtexec --exportLayerInfo`: it has no Layers")
    return tuple(row if isinstance(row, dict) else {"Name": str(row)} for row in rows)


def layers(path: Path, known: Sequence[_trt_report.Layer] = ()) -> LayerTimes:
    """Read the mean time of every layer; the whole is their sum, since trtexec exports no other.

    `known` tells, by name, what a layer is and computes in.

    Raises:
        ConfigError: the file is not what trtexec writes.
    """
    rows = _rows(path)
    named = [row for row in rows if "name" in row]
    if not rows or "count" not in rows[0] or not named or not all("averageMs" in row for row in named):
        raise ConfigError(f"{path}: not the layers of `trtexec --exportProfile`: it has no count and averageMs")
    information = {str(layer.get("Name")): layer for layer in known}
    kernels = tuple(_kernel(row, information.get(str(row["name"]), {})) for row in named)
    whole_ms = sum(kernel.mean_ms for kernel in kernels)
    runs = int(rows[0]["count"])
    return LayerTimes(
        profiler="trtexec --exportProfile", runs=runs, whole_ms=whole_ms, remainder_ms=0.0, kernels=kernels
    )


def _kernel(row: Mapping[str, Any], layer: _trt_report.Layer) -> LayerTime:
    name = str(row["name"])
    precision = _trt_report.count_precisions(_trt_report.kernels([layer]))
    return LayerTime(
        name=name,
        kind=str(layer.get("LayerType", "")),
        mean_ms=float(row["averageMs"]),
        layers=_trt_layers.covered(name),
        precision=precision[0][0] if precision else "",
    )


def of_bundle(folder: Path, manifest: Mapping[str, Any]) -> tuple[EngineResult, ...]:
    """Return what `build-engine.sh` left in a bundle after it was run; empty where it was not.

    Raises:
        ConfigError: a file is not what trtexec writes.
    """
    times, profile, information = (folder / name for name in (trtexec.TIMES, trtexec.PROFILE, trtexec.LAYERS))
    if not times.is_file():
        return ()
    found = measurement(
        times,
        batch=_batch(folder / trtexec.SHAPES, manifest),
        profile=profile if profile.is_file() else None,
        information=information if information.is_file() else None,
    )
    return (EngineResult(backend=NAME, measurement=found),)


def _batch(shapes: Path, manifest: Mapping[str, Any]) -> int:
    """Return the batch size that was measured: the script says it; those of earlier bundles measured the target's first."""
    if not shapes.is_file():
        return int((manifest.get("build") or {}).get("batch_sizes", [1])[0])
    batch = shapes.read_text(encoding="utf-8", errors="replace").strip().rpartition(":")[2].partition("x")[0]
    if not batch.isdecimal() or int(batch) < 1:
        raise ConfigError(f"{shapes}: not the shapes that build-engine.sh measured, such as input:8x3x224x224")
    return int(batch)


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    content = _content(path)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ConfigError(f"{path}: not an export of trtexec, which is a list")
    return content


def _content(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path}: too large for an export of trtexec")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON, so no export of trtexec ({error})") from error
