"""What `trtexec` exported (`--exportTimes`, `--exportProfile`) goes in, a `Measurement` comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdeploy import trtexec
from rdeploy.errors import ConfigError
from rdeploy.measured import LayerTime, LayerTimes, Measurement, Memory
from rdeploy.results import EngineResult

NAME = "tensorrt (trtexec)"
DEFINITION = "GPU time of one inference between two CUDA events, as trtexec measured it; no copies, no host"
_LARGEST_BYTES = 256 << 20


def measurement(times: Path, *, batch: int, profile: Path | None = None) -> Measurement:
    """Read the times of every inference, and of every layer where there is a profile.

    Raises:
        ConfigError: a file is not what trtexec writes.
    """
    rows = _rows(times)
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
        layers=None if profile is None else layers(profile),
        notes=("measured by trtexec, which warms up before it exports; it says nothing of memory",),
    )


def layers(path: Path) -> LayerTimes:
    """Read the mean time of every layer; the whole is their sum, since trtexec exports no other.

    Raises:
        ConfigError: the file is not what trtexec writes.
    """
    rows = _rows(path)
    named = [row for row in rows if "name" in row]
    if not rows or "count" not in rows[0] or not named or not all("averageMs" in row for row in named):
        raise ConfigError(f"{path}: not the layers of `trtexec --exportProfile`: it has no count and averageMs")
    kernels = tuple(LayerTime(name=str(row["name"]), kind="", mean_ms=float(row["averageMs"])) for row in named)
    whole_ms = sum(kernel.mean_ms for kernel in kernels)
    runs = int(rows[0]["count"])
    return LayerTimes(
        profiler="trtexec --exportProfile", runs=runs, whole_ms=whole_ms, remainder_ms=0.0, kernels=kernels
    )


def of_bundle(folder: Path, manifest: Mapping[str, Any]) -> tuple[EngineResult, ...]:
    """Return what `build-engine.sh` left in a bundle after it was run; empty where it was not.

    Raises:
        ConfigError: a file is not what trtexec writes.
    """
    times, profile = folder / trtexec.TIMES, folder / trtexec.PROFILE
    if not times.is_file():
        return ()
    # trtexec measures at the shapes that the engine is tuned for: the first batch size of the target.
    batch = (manifest.get("build") or {}).get("batch_sizes", [1])[0]
    found = measurement(times, batch=batch, profile=profile if profile.is_file() else None)
    return (EngineResult(backend=NAME, measurement=found),)


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ConfigError(f"{path}: too large for an export of trtexec")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON, so no export of trtexec ({error})") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ConfigError(f"{path}: not an export of trtexec, which is a list")
    return content
