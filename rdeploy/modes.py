"""Latencies go in; out comes whether they have one speed or two (a clock that switches, a neighbour that comes and goes).

Hartigan and Hartigan's dip (1985): how far the samples' distribution is from the nearest one with a single mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MIN_SAMPLES = 32
_CRITICAL = 0.75
"""sqrt(n) x dip of uniform samples, the worst case with one mode, stays under this 99.9 % of the time (simulated)."""
_MIN_GAP = 0.05
_MIN_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Modes:
    """Two speeds: the medians of both, and which share of the samples is the slow one's."""

    low_ms: float
    high_ms: float
    high_share: float
    dip: float


def find(latencies_ms: Sequence[float]) -> Modes | None:
    """Return the two speeds of the samples, or None where one speed explains them.

    Two it is where the dip test rejects one mode (p < 0.001), the two medians are at least 5 % apart, and either speed
    has at least 10 % of the samples: outliers are no mode, nor are two peaks that nobody would notice.
    """
    samples = np.sort(np.asarray(latencies_ms, dtype=np.float64))
    if len(samples) < _MIN_SAMPLES or samples[0] <= 0:
        return None
    found = dip(samples)
    if found * math.sqrt(len(samples)) < _CRITICAL:
        return None
    cut = _best_cut(samples)
    low, high = float(np.median(samples[:cut])), float(np.median(samples[cut:]))
    share = 1 - cut / len(samples)
    if high < low * (1 + _MIN_GAP) or not _MIN_SHARE <= share <= 1 - _MIN_SHARE:
        return None
    return Modes(low_ms=low, high_ms=high, high_share=share, dip=found)


def dip(samples: Sequence[float] | Any) -> float:
    """Return the dip: 1 / (2 n) for evenly spaced samples, 1/4 for two points with half of the samples each."""
    values, counts = np.unique(np.asarray(samples, dtype=np.float64), return_counts=True)
    above = np.cumsum(counts).astype(np.float64)
    below = above - counts
    first, last, distance = 0, len(values) - 1, 1.0
    while first < last:
        inside = slice(first, last + 1)
        x = values[inside]
        under, over = _hull(x, below[inside], sign=1), _hull(x, above[inside], sign=-1)
        minorant = np.interp(x, x[under], below[inside][under])
        majorant = np.interp(x, x[over], above[inside][over])
        begin, end, width = _modal_interval(under, over, majorant - minorant)
        if width <= distance:
            break
        left = (above[inside] - minorant)[:begin]
        right = (majorant - below[inside])[end + 1 :]
        distance = max(distance, left.max(initial=0.0), right.max(initial=0.0))
        if (begin, end) == (0, last - first):
            break
        first, last = first + begin, first + end
    return float(distance / (2 * above[-1]))


def _modal_interval(under: Any, over: Any, width: Any) -> tuple[int, int, float]:
    """Return the interval with the mode (from a touching point of one hull to the other's next), and the gap there."""
    touches = np.union1d(under, over)
    widest = int(touches[np.argmax(width[touches])])
    if widest in under:
        begin, end = widest, int(over[np.searchsorted(over, widest)])
    else:
        begin, end = int(under[np.searchsorted(under, widest, side="right") - 1]), widest
    return begin, end, float(width[widest])


def _hull(x: Any, y: Any, *, sign: int) -> Any:
    """Return the indices of the points on the lower (sign 1) or upper (sign -1) convex hull, in order."""
    kept: list[int] = []
    for index in range(len(x)):
        while len(kept) >= 2 and sign * _turn(x, y, kept[-2], kept[-1], index) <= 0:
            kept.pop()
        kept.append(index)
    return np.array(kept)


def _turn(x: Any, y: Any, a: int, b: int, c: int) -> float:
    return float((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]))


def _best_cut(samples: Any) -> int:
    """Return where to cut sorted samples so that both sides vary least around their means."""
    count = np.arange(1, len(samples))
    total = np.cumsum(samples)
    left, right = total[:-1] / count, (total[-1] - total[:-1]) / (len(samples) - count)
    between = count * (len(samples) - count) * (right - left) ** 2
    return int(np.argmax(between)) + 1
