"""Percentile: the range that holds all but a small share of the values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdeploy.errors import ConfigError
from rdeploy.quantize.calibrators import minmax
from rdeploy.quantize.histogram import Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`percentile`: how many per cent of the values the range holds, 50 to 100."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"calibrator percentile: {self.percentile} is not between 50 and 100")


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return the range that leaves (100 - percentile) % of the values outside, half on each side when affine."""
    low, high = minmax.find_range(histogram, minmax.Options(), symmetric=symmetric)
    centers, counts = histogram.filled()
    if not centers.size:
        return low, high
    outside = (1 - options.percentile / 100) * (counts.sum() + histogram.zeros)
    if symmetric:
        limit = _reached(np.abs(centers), counts, outside)
        return max(low, -limit), min(high, limit)
    return max(low, -_reached(-centers, counts, outside / 2)), min(high, _reached(centers, counts, outside / 2))


def _reached(values: np.ndarray, counts: np.ndarray, outside: float) -> float:
    """Return the smallest value, at least 0, that at most `outside` of the mass exceeds."""
    order = np.argsort(values)
    above = counts[order][::-1].cumsum()[::-1]
    beyond = np.flatnonzero(above <= outside)
    edge = values[order][beyond[0] - 1] if beyond.size and beyond[0] > 0 else values[order][-1]
    return max(float(edge), 0.0)
