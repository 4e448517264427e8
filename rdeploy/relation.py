"""What a changed decision costs in labelled accuracy: measured variants go in, a relation with its interval comes out.

loss = slope x decisions changed, through the origin (a variant that decides as the native model does loses nothing): the ratio
estimator over variants (Cochran, Sampling Techniques, chapter 6). Its variance has two parts: the spread of the variants around
it, and, since all are judged on the same images, that of a share among as many changed decisions as one variant has at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rdeploy.search import Interval
from rdeploy.types import Variant

LEAST_VARIANTS = 3


class Judged(Protocol):
    """A variant of which both may be known: what its labels say that it loses, and how many decisions it changes."""

    @property
    def variant(self) -> Variant:
        """Which variant."""
        ...

    @property
    def drop(self) -> Interval:
        """What it loses, in points."""
        ...

    @property
    def changed(self) -> Interval | None:
        """How many decisions in a hundred are not the native model's; None where there are no labels."""
        ...

    @property
    def samples(self) -> int:
        """On how many labelled images."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """How many points of accuracy are lost for each point of changed decisions, with its 95 % interval."""

    slope: Interval
    variants: int

    def loss(self, changed: Interval) -> Interval:
        """Return the loss that is expected of a variant that changes so many decisions in a hundred."""
        of_changed = (changed.high - changed.low) / 2
        of_slope = (self.slope.high - self.slope.low) / 2
        half = math.hypot(self.slope.value * of_changed, of_slope * changed.value)
        value = self.slope.value * changed.value
        return Interval(value=value, low=value - half, high=value + half)


def fit(measured: Sequence[Judged]) -> Relation | None:
    """Return the relation over variants of which both are known; None where fewer than three changed any decision."""
    known = [one for one in _by_variant(measured).values() if one.changed is not None and one.changed.value > 0]
    if len(known) < LEAST_VARIANTS:
        return None
    pairs = [(one.changed.value, one.drop.value) for one in known if one.changed is not None]
    total, count = sum(x for x, _ in pairs), len(pairs)
    slope = sum(y for _, y in pairs) / total
    around = count / (count - 1) * sum((y - slope * x) ** 2 for x, y in pairs) / total**2
    changed = max(one.changed.value * one.samples / 100 for one in known if one.changed is not None)
    shared = max(0.0, 1.0 - min(1.0, slope * slope)) / max(changed, 1.0)
    half = 1.96 * math.sqrt(around + shared)
    return Relation(slope=Interval(value=slope, low=slope - half, high=slope + half), variants=count)


def narrower(one: Judged, measured: Sequence[Judged]) -> tuple[Interval, Relation] | None:
    """Return the loss that the other variants' relation expects of a point, where that says more than its own labels do."""
    if one.changed is None or not one.samples:
        return None
    found = fit([other for other in measured if other.variant.id != one.variant.id])
    if found is None:
        return None
    expected = found.loss(one.changed)
    return (expected, found) if expected.high - expected.low < one.drop.high - one.drop.low else None


def _by_variant(measured: Sequence[Judged]) -> dict[str, Judged]:
    """Return one point of each variant: its engines on several backends decide alike, and would count it several times."""
    return {one.variant.id: one for one in reversed(measured)}
