"""Decide what to try next and what to take: candidates and what was measured of them go in, decisions with reasons come out.

Pure: no file, no clock, no model. The order is cheap first. `ruled_out` drops candidates by their analytic cost and by what
their FP32 form lost on a few images; `LatencyModel` predicts the rest from the points measured so far; `promising` names
those that could still enter the front; `front` and `choosing.choose` look at measured points only.

A *drop* is in percentage points of the task's metric, against the native model, with its 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rdeploy import pareto
from rdeploy.types import Variant

_PRIOR_SPREAD = 0.35
"""How far off, as a share, a latency predicted from too few points may be."""
_LEAST_SPREAD = 0.08
_LEAST_POINTS = 1.0
"""How far off, in points, a predicted loss may be at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to deploy: a variant on a backend."""

    variant: Variant
    backend: str

    @property
    def id(self) -> str:
        """`r168-int8@openvino`."""
        return f"{self.variant.id}@{self.backend}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is known of a variant before an engine is measured: its cost, and what it lost on `images` images so far."""

    variant: Variant
    macs: int
    drop: Interval
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured of a point.

    `changed` is how many decisions in a hundred are not the native model's, where `drop` is of labels, `samples` of them.
    """

    point: Point
    macs: int
    drop: Interval
    latency_ms: Interval
    throughput_ips: float
    memory_bytes: int | None
    size_bytes: int
    changed: Interval | None = None
    samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the user can afford; None where nothing was said. Memory is the process's peak, size the engine's files."""

    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    max_size_mb: float | None = None
    objective: str = "latency"


def resolutions(native: tuple[int, int], *, step: int = 32, least: float = 0.4) -> tuple[tuple[int, int], ...]:
    """Return the input sizes worth a look: the native one and those below it, `step` pixels of the shorter side apart.

    At least six steps are taken: a small native size gets a finer grid (in multiples of 4 pixels).
    """
    short = min(native)
    stride = min(step, max(4, round(short * (1 - least) / 6 / 4) * 4))
    sides = range(short, math.ceil(short * least) - 1, -stride)
    return tuple((round(native[0] * side / short), round(native[1] * side / short)) for side in sides)


def downwards(variants: Iterable[Variant]) -> list[Variant]:
    """Return variants place by place, each from its largest size down."""

    def size(variant: Variant) -> int:
        inside: list[tuple[int, int]] = [dict(options)["resolution"] for _, options in variant.resize_options]
        return math.prod(height * width for height, width in (variant.resolution, *inside))

    return sorted(variants, key=lambda one: (one.at, -size(one)))


def ruled_out(candidates: Sequence[Candidate], budget: Budget) -> dict[str, str]:
    """Return variant id -> reason for those that cannot be the answer, whatever their latency turns out to be.

    A variant is out when it surely loses more than the budget, or when another of the same precision costs no more and
    is surely more accurate. Intervals decide; the native variant always stays.
    """
    native = max(candidates, key=lambda one: one.macs, default=None)
    reasons: dict[str, str] = {}
    for one in candidates:
        if one is native:
            continue
        if budget.max_drop is not None and one.drop.low > budget.max_drop:
            reasons[one.variant.id] = (
                f"loses {points_text(one.drop)} on {one.images} images; at most {budget.max_drop:g} points were allowed"
            )
        elif better := next((other for other in candidates if _dominates(other, one)), None):
            reasons[one.variant.id] = (
                f"{better.variant.id} costs no more ({better.macs / 1e9:.2f} GMACs, here {one.macs / 1e9:.2f}) and loses "
                f"less: {points_text(better.drop)}, here {points_text(one.drop)}"
            )
    return reasons


def _dominates(first: Candidate, second: Candidate) -> bool:
    same = first.variant.precision == second.variant.precision
    return same and first is not second and first.macs <= second.macs and first.drop.high < second.drop.low


class LatencyModel:
    """Latency from the multiply-accumulates, per backend and precision, fitted in logarithms on what was measured.

    latency = a * macs^b; b is shared by the precisions of a backend, so that one point of each is enough to start with.
    The interval is the spread of the residuals, never under 8 %, and 35 % where nothing of the kind was measured.
    """

    def __init__(self, measured: Iterable[Evidence]) -> None:
        self._groups: dict[str, list[tuple[str, float, float]]] = {}
        for one in measured:
            entry = (one.point.variant.precision, math.log(max(one.macs, 1)), math.log(one.latency_ms.value))
            self._groups.setdefault(one.point.backend, []).append(entry)
        self._fits = {backend: _fit(entries) for backend, entries in self._groups.items()}

    def predict(self, point: Point, macs: int) -> Interval | None:
        """Return the expected latency in milliseconds; None where nothing was measured on the point's backend."""
        fit = self._fits.get(point.backend)
        if fit is None:
            return None
        slope, offsets, spread = fit
        known = point.variant.precision in offsets
        offset = offsets[point.variant.precision] if known else sum(offsets.values()) / len(offsets)
        value = math.exp(offset + slope * math.log(max(macs, 1)))
        around = spread if known else max(spread, _PRIOR_SPREAD * 2)
        return Interval(value=value, low=value * math.exp(-around), high=value * math.exp(around))


def _fit(entries: Sequence[tuple[str, float, float]]) -> tuple[float, dict[str, float], float]:
    """Return the slope, an offset for each precision, and the spread: least squares with one dummy for each precision."""
    precisions = sorted({precision for precision, _, _ in entries})
    groups = {p: [(x, y) for q, x, y in entries if q == p] for p in precisions}
    centred = [(x - _mean(g, 0), y - _mean(g, 1)) for g in groups.values() for x, y in g]
    across = sum(x * x for x, _ in centred)
    slope = sum(x * y for x, y in centred) / across if across > 1e-12 else 1.0
    slope = min(max(slope, 0.2), 1.2)  # a network is never free, and never worse than its work
    offsets = {p: _mean(g, 1) - slope * _mean(g, 0) for p, g in groups.items()}
    residuals = [y - offsets[p] - slope * x for p, x, y in entries]
    freedom = len(entries) - len(precisions) - 1
    if freedom < 1:
        return slope, offsets, _PRIOR_SPREAD
    return slope, offsets, max(_LEAST_SPREAD, 2 * math.sqrt(sum(r * r for r in residuals) / freedom))


def _mean(pairs: Sequence[tuple[float, float]], index: int) -> float:
    return sum(pair[index] for pair in pairs) / len(pairs)


class QualityModel:
    """What a rounded precision loses beyond its own FP32 form, from the places where both are known.

    One calibrated and measured place is enough to begin with: INT8 loses about as much at every resolution, since its ranges
    are found again at each. The spread is that of the differences, never under a point; without any, the FP32 form's loss is
    taken, as the most that can be hoped for.
    """

    def __init__(self, candidates: Sequence[Candidate], measured: Iterable[Evidence]) -> None:
        exact = {one.variant.place: one.drop.value for one in candidates if one.variant.precision == "fp32"}
        self._more: dict[str, list[float]] = {}
        for one in measured:
            variant = one.point.variant
            if variant.precision != "fp32" and variant.place in exact:
                self._more.setdefault(variant.precision, []).append(one.drop.value - exact[variant.place])

    def predict(self, candidate: Candidate) -> Interval:
        """Return the expected loss of a candidate, whose `drop` is that of its FP32 form."""
        more, drop = self._more.get(candidate.variant.precision), candidate.drop
        if candidate.variant.precision == "fp32" or not more:
            return drop
        mean = sum(more) / len(more)
        spread = max(_LEAST_POINTS, 2 * math.sqrt(sum((x - mean) ** 2 for x in more) / max(1, len(more) - 1)))
        low = drop.low + max(0.0, mean - spread)  # never expected to be better than in FP32
        return Interval(value=max(low, drop.value + mean), low=low, high=max(drop.high, drop.high + mean + spread))


def promising(
    candidates: Iterable[Candidate], backends: Sequence[str], measured: Sequence[Evidence], budget: Budget
) -> list[Point]:
    """Return the unmeasured points that could still enter the front or be the pick, the most hopeful first.

    A point is left out when some measured one is surely at least as good: faster than the point's most optimistic
    latency and losing no more than its most optimistic drop. What INT8 or FP16 will lose is predicted from what it lost at
    the places where it was measured.
    """
    candidates = tuple(candidates)
    model, quality = LatencyModel(measured), QualityModel(candidates, measured)
    known = {one.point.id for one in measured}
    hopes: list[tuple[float, Point]] = []
    for one in candidates:
        drop = quality.predict(one)
        if budget.max_drop is not None and drop.low > budget.max_drop:
            continue
        for backend in backends:
            point = Point(variant=one.variant, backend=backend)
            predicted = model.predict(point, one.macs)
            if point.id in known:
                continue
            if predicted is None:
                hopes.append((-math.inf, point))
            elif not _hopeless(predicted, drop, measured, budget):
                hopes.append((predicted.value, point))
    return [point for _, point in sorted(hopes, key=lambda hope: hope[0])]


def _hopeless(latency: Interval, drop: Interval, measured: Sequence[Evidence], budget: Budget) -> bool:
    if budget.max_latency_ms is not None and latency.low > budget.max_latency_ms:
        return True
    if budget.objective in ("memory", "size") or budget.max_memory_mb is not None or budget.max_size_mb is not None:
        return False  # a slower point may be the smaller one
    return any(one.latency_ms.high < latency.low and one.drop.value <= drop.low for one in measured)


def front(measured: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """Return the Pareto front of drop against latency, fastest first; latencies within 3 % of each other count as equal."""
    return pareto.front(measured, cost=lambda one: one.latency_ms.value, loss=lambda one: one.drop.value)


def points_text(drop: Interval) -> str:
    """Return `2.0 points [1.5, 2.5]`."""
    return f"{drop.value:.1f} points [{drop.low:.1f}, {drop.high:.1f}]"
