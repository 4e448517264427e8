"""A series goes in, the places where its level changed come out: exact optimal partitioning with a penalty per change.

Killick, Fearnhead and Eckley, "Optimal Detection of Changepoints with a Linear Computational Cost" (JASA 2012): the
dynamic programme that PELT prunes, for a mean that shifts. The noise is estimated from neighbouring differences, which a
shift hardly touches, and values far off their neighbours count only so much, so that one bad run is no change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean, median

from rdeploy.intervals import quantile

_PENALTY = 3.0
_SHORTEST = 3
"""So many values in a row make a level; fewer are an outlier."""
_ALPHA = 0.01
_CLIP = 4.0
_LEAST_NOISE = 1e-3
_TO_DEVIATION = 1.4826 / math.sqrt(2)


def find(values: Sequence[float]) -> tuple[int, ...]:
    """Return the indices at which a new level begins; empty for fewer than 6 values.

    Compares levels in units of the noise; give logarithms where changes are relative.
    """
    if len(values) < 2 * _SHORTEST:
        return ()
    noise = _noise(values)
    scaled = _clipped([value / noise for value in values])
    penalty = _PENALTY * math.log(len(scaled))
    sums, squares = _running(scaled), _running([value * value for value in scaled])
    best, last = [-penalty], [0]
    for end in range(1, len(scaled) + 1):
        options = [
            (best[start] + _cost(sums, squares, start, end) + penalty, start)
            for start in range(0, end - _SHORTEST + 1)
            if math.isfinite(best[start])
        ]
        cost, start = min(options, default=(math.inf, 0))
        best.append(cost)
        last.append(start)
    return _confirmed(values, _back(last))


def levels(values: Sequence[float], changes: Sequence[int]) -> tuple[tuple[int, int, float], ...]:
    """Return (begin, end, mean) of every stretch between the changes."""
    edges = [0, *changes, len(values)]
    return tuple((begin, end, fmean(values[begin:end])) for begin, end in itertools.pairwise(edges) if end > begin)


def _confirmed(values: Sequence[float], changes: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the least certain change until all of them stand in a t test of the stretches on either side.

    The test holds what the estimate of the noise cannot: how little a few values say, and how far theirs scatter.
    """
    while changes:
        edges = [0, *changes, len(values)]
        sure = [
            _surprise(values[begin:middle], values[middle:end])
            for begin, middle, end in zip(edges, edges[1:], edges[2:])
        ]
        weakest = min(range(len(sure)), key=sure.__getitem__)
        if sure[weakest] >= 1.0:
            return changes
        changes = (*changes[:weakest], *changes[weakest + 1 :])
    return ()


def _surprise(before: Sequence[float], after: Sequence[float]) -> float:
    """Return |t| over its critical value; the place was searched for, so the level is shared among all places."""
    count = len(before) + len(after)
    squares = sum((value - fmean(part)) ** 2 for part in (before, after) for value in part)
    pooled = max(_LEAST_NOISE**2, squares / (count - 2))
    t = abs(fmean(after) - fmean(before)) / math.sqrt(pooled * (1 / len(before) + 1 / len(after)))
    return t / quantile(1 - _ALPHA / (2 * count), count - 2)


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation of the noise, at least a thousandth."""
    steps = [abs(after - before) for before, after in itertools.pairwise(values)]
    return max(_LEAST_NOISE, _TO_DEVIATION * median(steps))


def _clipped(scaled: list[float]) -> list[float]:
    """Pull a value that is far off the median of its five neighbours back to where it counts as a large error only."""
    found = []
    for index, value in enumerate(scaled):
        near = median(scaled[max(0, index - 2) : index + 3])
        found.append(min(max(value, near - _CLIP), near + _CLIP))
    return found


def _running(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _cost(sums: list[float], squares: list[float], start: int, end: int) -> float:
    """Return the sum of squares around the mean of values[start:end]."""
    total = sums[end] - sums[start]
    return squares[end] - squares[start] - total * total / (end - start)


def _back(last: list[int]) -> tuple[int, ...]:
    found = []
    end = len(last) - 1
    while (end := last[end]) > 0:
        found.append(end)
    return tuple(reversed(found))
