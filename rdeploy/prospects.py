"""What is worth measuring next: candidates and what was measured so far go in; points, or the reason against them, come out.

Pure. All points are judged on the same images, and an FP32 engine decides as its graph did: what an FP32 point will show is
known before it is built, and only what rounding adds, and the latency, are predicted from the points measured so far. A
prediction is an interval; a point is left out when even its hopeful end is no use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rdeploy import relation
from rdeploy.search import Budget, Candidate, Evidence, Interval, Point, Way, points_text
from rdeploy.types import Variant

_INPUT = "input"
_LEAST_SPREAD = 0.08
"""How far off, as a share, a predicted latency may be at least."""
_FOREIGN_SPREAD = 0.7
"""The same, in logarithms, for a precision of which nothing was measured on the backend."""
_ANY_SLOPE = Interval(value=1.0, low=0.2, high=1.2)
"""The power of the work that latency goes with: a network is never free, and hardly worse than its work."""
_OTHER_WAY = 0.3
"""How far that power may be from what it is on another backend, or at another batch size."""
_MUCH_SLOWER = 1.25
"""What is expected to be slower by this than another way to run the same variant waits for what that shows."""
_LEAST_POINTS = 1.0
"""How far off, in points, a predicted loss may be at least."""
_TELLING_POINTS, _TELLING_IMAGES = 0.5, 2
"""A slower point has to lose this much less to be worth measuring: half a point, and what two images make."""
_ROUNDING_CHANGES = 5.0
"""How many decisions in a hundred a rounded precision is expected to change, where none was measured."""


def ruled_out(
    candidates: Sequence[Candidate], budget: Budget, *, native: Variant, final: bool = False
) -> dict[str, str]:
    """Return variant id -> reason for those that cannot be the answer, whatever their latency turns out to be.

    A variant is out when it loses more than the budget, or when another of the same precision costs no more and
    is surely more accurate. Intervals decide; the native variant always stays.

    Args:
        final: the candidates were judged on all the images that their engines will be judged on.
    """
    reasons: dict[str, str] = {}
    for one in candidates:
        if one.variant == native:
            continue
        if reason := beyond(one, candidates, budget, final=final):
            reasons[one.variant.id] = reason
        elif better := next((other for other in candidates if _dominates(other, one)), None):
            reasons[one.variant.id] = (
                f"{better.variant.id} costs no more ({better.macs / 1e9:.2f} GMACs, here {one.macs / 1e9:.2f}) and loses "
                f"less: {points_text(better.drop)}, here {points_text(one.drop)}"
            )
    return reasons


def beyond(one: Candidate, candidates: Sequence[Candidate], budget: Budget, *, final: bool) -> str:
    """Return why no engine of a variant can lose so little as was allowed, or nothing.

    Before all images were judged, its interval has to say so. On all of them its FP32 form will show what it showed here, and a
    rounded form what it showed but for the decisions that rounding changes, a random walk: two standard deviations of that.
    Where another limit may leave nothing within the budget, points beyond it are wanted too: what would it take?
    """
    limit = budget.max_drop
    if limit is None:
        return ""
    lost = f"loses {points_text(one.drop)} on {one.images} images; at most {limit:g} points were allowed"
    if one.drop.low > limit:
        return lost
    if final and budget.limits_only_the_drop:
        luck = _random_walk(_ROUNDING_CHANGES, one.samples) if one.changed is not None else 0.0
        if _least(one, candidates) - luck > limit:
            return f"{lost}, and rounding is not expected to win {_least(one, candidates) - limit:.1f} back"
    return ""


def _least(one: Candidate, candidates: Sequence[Candidate]) -> float:
    """Return the loss by which a variant's FP32 form will be judged: its labels', or what its changed decisions are expected
    to cost, whichever is kinder."""
    expected = relation.narrower(one, candidates)
    return one.drop.value if expected is None else min(one.drop.value, expected[0].value)


def _random_walk(changed: float, samples: int) -> float:
    """Return how many points may be won or lost when so many decisions in a hundred change: two standard deviations."""
    return 200 * math.sqrt(changed / 100 / samples) if samples else 0.0


def _dominates(first: Candidate, second: Candidate) -> bool:
    same = first.variant.precision == second.variant.precision
    return same and first is not second and first.macs <= second.macs and first.drop.high < second.drop.low


class LatencyModel:
    """Latency from the multiply-accumulates, per way to run, precision and place, fitted in logarithms on what was measured.

    latency = a * c * macs^b: a for each precision, from its points at the input; c for each other place, which costs more than
    its work says (merging tokens, filtering) in every precision alike; b for the backend at one batch size, so that one point of
    each is enough to start with. The interval grows with the distance from what was measured, as far as b is uncertain, and
    never is under 8 %. A place of which nothing was measured may take twice what its work says, but hardly less. A way to run
    that was measured at one size only has a b like those of the others.
    """

    def __init__(self, measured: Iterable[Evidence]) -> None:
        groups: dict[Way, list[Evidence]] = {}
        for one in measured:
            groups.setdefault(one.point.way, []).append(one)
        fits = {way: _fit(entries, _ANY_SLOPE) for way, entries in groups.items()}
        near = _like([fit.slope for fit in fits.values() if fit.has_slope])
        self._fits = {way: fit if fit.has_slope else _fit(groups[way], near) for way, fit in fits.items()}

    def predict(self, point: Point, macs: int) -> Interval | None:
        """Return the expected milliseconds of a run; None where nothing was measured on the point's backend at its batch."""
        fit = self._fits.get(point.way)
        if fit is None:
            return None
        known = point.variant.precision in fit.centres
        centre, level = fit.centres.get(point.variant.precision) or _mean(list(fit.centres.values()))
        level += fit.places.get(point.variant.at, 0.0)
        distance = math.log(max(macs, 1)) - centre
        ends = sorted(level + slope * distance for slope in (fit.slope.low, fit.slope.high))
        around = fit.spread if known else max(fit.spread, _FOREIGN_SPREAD)
        above = around if point.variant.at in fit.places else max(around, _FOREIGN_SPREAD)
        return Interval(
            value=math.exp(level + fit.slope.value * distance),
            low=math.exp(ends[0] - around),
            high=math.exp(ends[1] + above),
        )


@dataclass(frozen=True, slots=True)
class _Fit:
    """A line for each precision of one way to run: through its centre (log macs, log ms), with the slope that they share.

    `places` are by how much a place lies above that line; `has_slope` is whether the slope was measured.
    """

    slope: Interval
    has_slope: bool
    centres: dict[str, tuple[float, float]]
    places: dict[str, float]
    spread: float


def _like(slopes: Sequence[Interval]) -> Interval:
    """Return what a slope can be where others are such."""
    if not slopes:
        return _ANY_SLOPE
    low = max(_ANY_SLOPE.low, min(one.low for one in slopes) - _OTHER_WAY)
    high = min(_ANY_SLOPE.high, max(one.high for one in slopes) + _OTHER_WAY)
    return Interval(value=fmean(one.value for one in slopes), low=low, high=high)


def _fit(entries: Sequence[Evidence], near: Interval) -> _Fit:
    """Return the least-squares lines, with one slope within all groups of one precision and place: `near` where it is unknown."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in entries:
        pair = (math.log(max(one.macs, 1)), math.log(one.latency_ms.value))
        groups.setdefault((one.variant.precision, one.variant.at), []).append(pair)
    means = {key: _mean(pairs) for key, pairs in groups.items()}
    centred = [(x - means[key][0], y - means[key][1]) for key, pairs in groups.items() for x, y in pairs]
    across = sum(x * x for x, _ in centred)
    spans = across > 1e-12
    slope = min(max(sum(x * y for x, y in centred) / across, _ANY_SLOPE.low), _ANY_SLOPE.high) if spans else near.value
    centres, places = _levels(means, slope)
    residuals = [
        y - centres[precision][1] - places[at] - slope * (x - centres[precision][0])
        for (precision, at), pairs in groups.items()
        for x, y in pairs
    ]
    measured = max(math.log(one.latency_ms.high / one.latency_ms.low) / 2 for one in entries)
    freedom = len(entries) - len(centres) - len(places)
    deviation = 2 * math.sqrt(sum(r * r for r in residuals) / freedom) if freedom > 0 else 0.0
    low, high = near.low, near.high
    if spans and freedom > 0:
        around = deviation / math.sqrt(across)
        low, high = max(_ANY_SLOPE.low, slope - around), min(_ANY_SLOPE.high, slope + around)
    return _Fit(
        slope=Interval(value=slope, low=low, high=high),
        has_slope=spans and freedom > 0,
        centres=centres,
        places=places,
        spread=max(_LEAST_SPREAD, measured, deviation),
    )


def _levels(
    means: Mapping[tuple[str, str], tuple[float, float]], slope: float
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Return the centre of each precision, at the input where that was measured, and how far each place lies above."""
    centres: dict[str, tuple[float, float]] = {}
    for (precision, _), mean in sorted(means.items(), key=lambda item: item[0][1] != _INPUT):
        centres.setdefault(precision, mean)
    above: dict[str, list[float]] = {_INPUT: [0.0]}
    for (precision, at), (x, y) in means.items():
        if at != _INPUT and (precision, _INPUT) in means:
            above.setdefault(at, []).append(y - centres[precision][1] - slope * (x - centres[precision][0]))
    places = {at: fmean(shifts) for at, shifts in above.items()}
    return centres, dict.fromkeys((at for _, at in means), 0.0) | places


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(x for x, _ in pairs), fmean(y for _, y in pairs)


class QualityModel:
    """What a point will be seen to lose: its FP32 form's loss, and for a rounded precision what that lost more elsewhere.

    One measured place is enough to begin with: INT8 loses about as much at every resolution, since its ranges are found again
    at each. How far off that may be: the spread of the differences, or what as many decisions as it changes can win or lose by
    chance, and never under a point. Measured in another way already, a variant will lose about what it lost there.
    """

    def __init__(self, candidates: Sequence[Candidate], measured: Iterable[Evidence]) -> None:
        exact = {one.variant.place: one.drop.value for one in candidates if one.variant.precision == "fp32"}
        self._candidates = [one for one in candidates if one.variant.precision == "fp32"]
        self._more: dict[str, list[float]] = {}
        self._changed: dict[str, float] = {}
        self._seen: dict[str, list[float]] = {}
        for one in measured:
            self._seen.setdefault(one.variant.id, []).append(one.drop.value)
            precision = one.variant.precision
            if precision == "fp32" or one.variant.place not in exact:
                continue
            self._more.setdefault(precision, []).append(one.drop.value - exact[one.variant.place])
            if one.changed is not None:
                self._changed[precision] = min(one.changed.value, self._changed.get(precision, math.inf))

    def predict(self, candidate: Candidate) -> Interval:
        """Return the loss that is expected to be seen of a candidate, whose `drop` is that of its FP32 form."""
        drop, precision = candidate.drop.value, candidate.variant.precision
        if precision == "fp32":
            return Interval(value=drop, low=drop, high=drop)
        if seen := self._seen.get(candidate.variant.id):
            return Interval(value=fmean(seen), low=min(seen) - _LEAST_POINTS, high=max(seen) + _LEAST_POINTS)
        more = self._more.get(precision, [])
        changed = self._changed.get(precision, _ROUNDING_CHANGES)
        spread = max(
            _LEAST_POINTS,
            2 * stdev(more) if len(more) > 1 else 0.0,
            _random_walk(changed, candidate.samples) if candidate.changed is not None else 0.0,
        )
        value = drop + max(0.0, fmean(more) if more else 0.0)
        return Interval(value=value, low=value - spread, high=value + spread)

    def kindest(self, candidate: Candidate) -> float:
        """Return the least loss by which a candidate may be judged: by its labels, or by its changed decisions."""
        return self.predict(candidate).low - candidate.drop.value + _least(candidate, self._candidates)


class Prospects:
    """What can be expected of the points that were not measured yet."""

    def __init__(
        self,
        candidates: Iterable[Candidate],
        ways: Sequence[Way],
        measured: Sequence[Evidence],
        budget: Budget,
        *,
        wanted: Collection[Variant] | None = None,
    ) -> None:
        """Args: `wanted` are the variants that may be measured (all where nothing is said); the others only tell of them."""
        candidates = tuple(candidates)
        self._measured, self._budget = measured, budget
        self._latency, self._quality = LatencyModel(measured), QualityModel(candidates, measured)
        known = {one.point.id for one in measured}
        every = [
            (one, Point(variant=one.variant, backend=backend, batch=batch))
            for one in candidates
            if wanted is None or one.variant in wanted
            for backend, batch in ways
        ]
        self._left = [(one, point) for one, point in every if point.id not in known]

    def promising(self) -> list[Point]:
        """Return the unmeasured points that could still enter the front or be the pick, the most hopeful first.

        Those come first that are expected to be within the budget, by their latency; before them what nothing is known of.
        """
        return [point for _, point in sorted(self._hopes(), key=lambda hope: hope[0])]

    def foremost(self, points: Sequence[Point]) -> list[Point]:
        """Return those of some points that need not wait: what is much slower than another way to run a variant may be ruled
        out by what that shows."""
        macs = {one.variant.id: one.macs for one, _ in self._left}

        def expected(point: Point) -> float:
            latency = self._latency.predict(point, macs[point.variant.id])
            return latency.value / point.batch if latency else 0.0

        fastest: dict[str, float] = {}
        for point in points:
            fastest[point.variant.id] = min(expected(point), fastest.get(point.variant.id, math.inf))
        return [p for p in points if expected(p) <= _MUCH_SLOWER * fastest[p.variant.id]]

    def _hopes(self) -> Iterable[tuple[tuple[bool, float], Point]]:
        limit = math.inf if self._budget.max_drop is None else self._budget.max_drop
        for one, point in self._left:
            if not self.against(one, point):
                latency = self._latency.predict(point, one.macs)
                expected = self._quality.predict(one).value
                yield (expected > limit, latency.value / point.batch if latency else -math.inf), point

    def reasons(self) -> dict[str, str]:
        """Return point id -> why it is not worth measuring, for those that are not."""
        found = {point.id: self.against(one, point) for one, point in self._left}
        return {name: reason for name, reason in found.items() if reason}

    def against(self, one: Candidate, point: Point) -> str:
        """Return why a point is not worth measuring, or nothing.

        It is left out when even its most hopeful loss or latency is beyond the budget, or when some measured point within the
        allowed latency is as good: surely faster, image for image, and losing no more than the most hopeful but for what so few
        images do not tell.
        """
        budget, drop = self._budget, self._quality.predict(one)
        if budget.max_drop is not None and self._quality.kindest(one) > budget.max_drop:
            return f"is expected to lose {points_text(drop)}; at most {budget.max_drop:g} points were allowed"
        latency = self._latency.predict(point, one.macs)
        if latency is None:
            return ""
        if budget.max_latency_ms is not None and latency.low > budget.max_latency_ms:
            return f"is expected to take {latency.low:.2f} ms at least; {budget.max_latency_ms:g} ms were allowed"
        if budget.objective in ("memory", "size") or budget.max_memory_mb is not None or budget.max_size_mb is not None:
            return ""  # a slower point may be the smaller one
        as_good = drop.low + max(_TELLING_POINTS, 100 * _TELLING_IMAGES / max(one.images, 1))
        better = [e for e in self._measured if self._faster(e, latency.low / point.batch) and e.drop.value <= as_good]
        if not better:
            return ""
        best = min(better, key=lambda e: (e.drop.value, e.ms_per_image))
        return (
            f"{best.point.id} takes {_times(best.latency_ms.value, best.point)} and loses {best.drop.value:.1f} points; this is "
            f"expected to take {_times(latency.low, point)} and to lose {drop.low:.1f} at least"
        )

    def _faster(self, one: Evidence, ms_per_image: float) -> bool:
        limit = self._budget.max_latency_ms
        allowed = limit is None or one.latency_ms.value <= limit
        return allowed and one.latency_ms.high / one.point.batch < ms_per_image


def _times(milliseconds: float, point: Point) -> str:
    each = "" if point.batch == 1 else " for each image"
    return f"{milliseconds / point.batch:.2f} ms{each}"


def within_reach(beyond: Iterable[Candidate], ways: Sequence[Way], measured: Sequence[Evidence], budget: Budget) -> str:
    """Say which variant that loses more than was allowed may be within the allowed latency, where nothing measured is.

    Args:
        beyond: variants that were judged in FP32 and not measured; their latency is predicted.
    """
    drop, limit = budget.max_drop, budget.max_latency_ms
    if drop is None or limit is None or any(one.latency_ms.value <= limit for one in measured):
        return ""
    model = LatencyModel(measured)
    found: list[tuple[float, float, Point]] = []
    for one in beyond:
        for backend, batch in ways:
            point = Point(variant=one.variant, backend=backend, batch=batch)
            latency = model.predict(point, one.macs)
            if latency is not None and latency.value <= limit and one.drop.value > drop:
                found.append((one.drop.value, latency.value, point))
    if not found:
        return ""
    lost, milliseconds, point = min(found, key=lambda one: one[:2])
    return (
        f"{point.id}, which was not measured, is expected to take {milliseconds:.2f} ms; its FP32 form loses {lost:.1f} points: "
        f"search again with --max-drop {math.ceil(10 * lost) / 10:g}"
    )
