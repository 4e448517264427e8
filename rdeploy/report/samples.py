"""What lies beside a manifest goes in; raw latencies, times by layer and errors by tensor come out, without damaged parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rdeploy import serde
from rdeploy.errors import ConfigError
from rdeploy.measured import LayerTimes
from rdeploy.report.points import Bundle

_NUMBERS = ("low", "high", "clipped", "own_db", "sqnr_db")


def with_samples(bundle: Bundle, measurements: Any, quantization: Any) -> Bundle:
    """Return the bundle with what its measurements.json and its quantization.json hold, as JSON values or None."""
    found = measurements if isinstance(measurements, Mapping) else {}
    told = quantization.get("tensors") if isinstance(quantization, Mapping) else None
    tensors = tuple(one for one in told if _is_tensor(one)) if isinstance(told, list) else ()
    return replace(
        bundle,
        latencies_ms=_latencies(found.get("engines")),
        baseline_ms=_latencies(found.get("baseline")),
        layers=_layers(found.get("engines")),
        baseline_layers=_layers(found.get("baseline")),
        tensors=tensors,
    )


def _latencies(engines: Any) -> dict[str, Sequence[float]]:
    found: dict[str, Sequence[float]] = {}
    for name, one in engines.items() if isinstance(engines, Mapping) else ():
        values = one.get("latencies_ms") if isinstance(one, Mapping) else None
        if isinstance(values, list) and all(_is_number(value) and 0 < value < 1e9 for value in values):
            found[str(name)] = [float(value) for value in values]
    return found


def _layers(engines: Any) -> dict[str, LayerTimes]:
    found: dict[str, LayerTimes] = {}
    for name, one in engines.items() if isinstance(engines, Mapping) else ():
        told = one.get("layers") if isinstance(one, Mapping) else None
        if told is None:
            continue
        try:
            times = serde.from_json(LayerTimes, told)
        except (ConfigError, TypeError, ValueError):
            continue
        if all(_is_number(kernel.mean_ms) for kernel in times.kernels) and _is_number(times.whole_ms):
            found[str(name)] = times
    return found


def _is_tensor(one: Any) -> bool:
    return isinstance(one, Mapping) and "name" in one and all(_is_number(one.get(name)) for name in _NUMBERS)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
