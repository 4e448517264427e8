"""A run's bundles go in; tables of where the time goes by layer, and where rounding hurts, come out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rdeploy.measured import LayerTimes
from rdeploy.report.points import Bundle, Point
from rdeploy.report.profile import by_layer

_LAYERS, _TENSORS, _MOST = 10, 8, 6
_ORDER = ("pick", "front", "")
_NONE = "–"
Part = dict[str, Any]


def parts(bundles: Sequence[Bundle], found: Sequence[Point]) -> list[Part]:
    """Return a table of times for the pick, the front, then other points up to six, and one of errors for each INT8 variant.

    A variant that does not pay has its tables as well: they say why.
    """
    wanted = sorted((one for one in found if one.role in _ORDER), key=lambda one: _ORDER.index(one.role))
    by_variant = {bundle.name: bundle for bundle in bundles}
    made: list[Part] = []
    for one in wanted[:_MOST]:
        bundle = by_variant.get(one.variant)
        if bundle is None:
            continue
        if (times := bundle.layers.get(one.backend)) is not None:
            made.append(_times(one, times, bundle.baseline_layers.get(one.backend), _errors_by_layer(bundle.tensors)))
    for name in dict.fromkeys(one.variant for one in wanted[:_MOST]):
        if name in by_variant and by_variant[name].tensors:
            made.append(_tensors(name, by_variant[name].tensors))
    return made


def _times(one: Point, times: LayerTimes, native: LayerTimes | None, errors: Mapping[str, float]) -> Part:
    mine, theirs = by_layer(times), by_layer(native) if native else {}
    order = sorted({*mine, *theirs}, key=lambda name: (-max(mine.get(name, 0.0), theirs.get(name, 0.0)), name))
    rows = [
        [name, _ms(theirs.get(name)), _ms(mine.get(name)), _db(errors.get(name)) if errors else _NONE]
        for name in order[:_LAYERS]
    ]
    if rest := order[_LAYERS:]:
        rows.append([f"({len(rest)} more)", _sum(theirs, rest), _sum(mine, rest), _NONE])
    rows.append(["(remainder)", _ms(native.remainder_ms if native else None), _ms(times.remainder_ms), _NONE])
    rows.append(["whole", _ms(native.whole_ms if native else None), _ms(times.whole_ms), _NONE])
    return {
        "title": f"{one.id}: time by layer",
        "caption": f"Mean of {times.runs} runs under {times.profiler}, which costs time itself; the native model beside it. "
        "A runtime that fuses layers counts them with the first.",
        "head": "layer",
        "columns": ["native ms", "variant ms", "input's error dB"],
        "rows": rows,
        "open": one.role == "pick",
    }


def _tensors(name: str, tensors: Sequence[Mapping[str, Any]]) -> Part:
    worst = sorted(tensors, key=lambda one: float(one["own_db"]))[:_TENSORS]
    return {
        "title": f"{name}: quantization error",
        "caption": f"The {len(worst)} of {len(tensors)} quantized tensors that rounding hurts most, 8 images: alone, and "
        "with all that came before. Rounded weights are not in these figures.",
        "head": "tensor",
        "columns": ["range", "clipped %", "alone dB", "together dB", "what would repair it"],
        "rows": [
            [
                str(one["name"]),
                f"{float(one['low']):.3g} .. {float(one['high']):.3g}",
                f"{100 * float(one['clipped']):.2f}",
                _db(float(one["own_db"])),
                _db(float(one["sqnr_db"])),
                str(one.get("advice") or ""),
            ]
            for one in worst
        ],
        "open": False,
    }


def _errors_by_layer(tensors: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return, by the layer that reads it, the error of its worst input, all that came before included."""
    found: dict[str, float] = {}
    for one in tensors:
        for reader in one.get("readers") or ():
            found[str(reader)] = min(found.get(str(reader), math.inf), float(one["sqnr_db"]))
    return found


def _sum(times: Mapping[str, float], names: Iterable[str]) -> str:
    return _ms(sum(times.get(name, 0.0) for name in names)) if times else _NONE


def _ms(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _db(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"
