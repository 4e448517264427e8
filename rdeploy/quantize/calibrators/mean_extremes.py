"""Mean extremes: the lowest and highest value of an image, averaged over the images; one unlike the others counts once."""

from __future__ import annotations

from dataclasses import dataclass

from rdeploy.quantize.calibrators import minmax
from rdeploy.quantize.histogram import Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Mean extremes have no options."""


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return the mean over the batches of their extremes, zero included."""
    count = max(histogram.batches, 1)
    low, high = min(histogram.lows / count, 0.0), max(histogram.highs / count, 0.0)
    if low == high == 0.0:
        return minmax.find_range(histogram, minmax.Options(), symmetric=symmetric)
    return (-max(-low, high), max(-low, high)) if symmetric else (low, high)
