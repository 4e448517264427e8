"""A run's bundles and what its search wrote down go in; a row for each point that was measured comes out, with its role."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rdeploy import serde
from rdeploy.errors import ConfigError
from rdeploy.report import points as rows
from rdeploy.report.points import NATIVE, NO_BUNDLE, Bundle, Point
from rdeploy.types import Variant, engine_name, format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a search found of a variant: measured on a backend, or without one only judged in FP32 on `images` images."""

    variant: Variant
    drop: float
    macs: float
    backend: str = ""
    batch: int = 1
    images: int = 0
    latency_ms: float | None = None
    memory_bytes: float | None = None
    size_bytes: float | None = None

    @property
    def way(self) -> str:
        """The backend, with the batch: `openvino-batch8`."""
        return engine_name(self.backend, self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `rdeploy optimize` says in `outcome.json`; without a pick nothing satisfies the budget, and `reason` says why."""

    pick: str | None
    reason: str
    front: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Bundles in the same folder that this search did not write, such as those of an earlier front: they are not shown."""
    measured: tuple[Seen, ...] = ()
    judged: tuple[Seen, ...] = ()


def points(bundles: Sequence[Bundle], outcome: Outcome | None) -> tuple[Point, ...]:
    """Return the points of a run with the roles that its search gave them; without a search those that `points.points` gives.

    What was measured and has no bundle is placed by its speed-up, beside the native model as the bundles show it.
    """
    if outcome is None or not bundles:
        return rows.points(bundles)
    native = (bundles[0].manifest.get("baseline") or {}).get("id")

    def called(point: str) -> str:
        variant, _, way = point.partition("@")
        return f"{NATIVE}@{way}" if variant == native else point

    told = {called(f"{one.variant.id}@{one.way}"): one for one in outcome.measured}
    found = {one.id: one for one in rows.rows(bundles)}
    for name, one in told.items():
        if name not in found:
            beside = f"{NATIVE}@{one.way}"
            found[name] = _measured(name, one, found.get(beside), told.get(beside), _reference(bundles))
        elif found[name].peak_mb is None:
            found[name] = replace(found[name], peak_mb=_over(one.memory_bytes, 1e6))
    pick = None if outcome.pick is None else called(outcome.pick)
    return rows.marked(found.values(), on_front=[called(name) for name in outcome.front], pick=pick)


def judged(bundles: Sequence[Bundle], outcome: Outcome | None) -> tuple[Point, ...]:
    """Return the variants that the search judged in FP32, whether an engine was built for them or not."""
    found = () if outcome is None else outcome.judged
    return tuple(
        replace(_point(one.variant.id, one, _reference(bundles)), status=f"judged in FP32 on {one.images} images")
        for one in found
    )


def seen(told: Any) -> Seen | None:
    """Return what one entry of `outcome.json` holds, a measured point or a judged variant; None where it is damaged."""
    try:
        point = told.get("point") or told
        variant = serde.from_json(Variant, point["variant"])
        return Seen(
            variant=replace(variant, resolution=(int(variant.resolution[0]), int(variant.resolution[1]))),
            drop=_number(told["drop"]["value"]),
            macs=_number(told["macs"]),
            backend=str(point.get("backend") or ""),
            batch=int(point.get("batch") or 1),
            images=int(told.get("images") or 0),
            latency_ms=_number(told["latency_ms"]["value"]) if "latency_ms" in told else None,
            memory_bytes=None if told.get("memory_bytes") is None else _number(told["memory_bytes"]),
            size_bytes=None if told.get("size_bytes") is None else _number(told["size_bytes"]),
        )
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return value


def _reference(bundles: Sequence[Bundle]) -> float | None:
    """Return the native model's accuracy, per cent."""
    return next((one.accuracy for one in rows.rows(bundles) if one.variant == NATIVE), None)


def _measured(name: str, told: Seen, native: Point | None, native_told: Seen | None, reference: float | None) -> Point:
    """Return a point without a bundle; its latency is that of the native model over its speed-up, where both are known."""
    speedup, p50_ms = None, told.latency_ms
    if native_told is not None and native_told is not told and native_told.latency_ms and told.latency_ms:
        speedup = native_told.latency_ms / told.latency_ms
    if speedup is not None and native is not None and native.p50_ms is not None:
        p50_ms = native.p50_ms / speedup
    return replace(_point(name, told, reference), p50_ms=p50_ms, speedup=speedup, status=NO_BUNDLE)


def _point(name: str, told: Seen, reference: float | None) -> Point:
    return Point(
        id=name,
        variant=name.partition("@")[0],
        backend=told.backend,
        batch=told.batch,
        resolution=format_size(told.variant.resolution),
        side=min(told.variant.resolution),
        precision=told.variant.precision,
        position=told.variant.at,
        accuracy=None if reference is None else reference - told.drop,
        peak_mb=_over(told.memory_bytes, 1e6),
        size_mb=_over(told.size_bytes, 1e6),
        gmacs=_over(told.macs, 1e9),
    )


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
