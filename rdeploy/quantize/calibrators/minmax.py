"""Min-max: the whole range that was seen. Never clips, so one outlier costs every other value its resolution."""

from __future__ import annotations

from dataclasses import dataclass

from rdeploy.quantize.histogram import Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Min-max has no options."""


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return (low, high) of everything that was seen, zero included."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return low, high
