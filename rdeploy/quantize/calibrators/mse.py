"""MSE: the range that makes the squared error of rounding plus clipping smallest, searched over the histogram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rdeploy.errors import ConfigError
from rdeploy.quantize.calibrators import minmax
from rdeploy.quantize.histogram import Floats, Histogram

_COARSE = np.geomspace(1.0, 0.02, 48)
_FINE = np.linspace(1.08, 0.92, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`power`: the exponent of the error; 2 is the squared error, a higher one minds outliers more. `bits` make the steps."""

    power: float = 2.0
    bits: int = 8

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ConfigError(f"calibrator mse: power {self.power} must be above 0")
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"calibrator mse: {self.bits} bits; 2 to 8 can be simulated")


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return the range with the least expected |x - Q(x)|^power."""
    centers, counts = histogram.filled()
    width = 2 * histogram.limit / histogram.bins
    return search(histogram, lambda span: error(centers, counts, width, span, symmetric, options), symmetric=symmetric)


def search(
    histogram: Histogram, error_of: Callable[[tuple[float, float]], float], *, symmetric: bool, beyond: float = 1.0
) -> tuple[float, float]:
    """Return the range with the least `error_of`, its ends at most `beyond` times those that were seen.

    Shrinks both ends together over a geometric grid first, then each end alone (affine), then refines.
    """
    low, high = (end * beyond for end in minmax.find_range(histogram, minmax.Options(), symmetric=symmetric))
    if not histogram.counts.any():
        return low, high

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        return candidates[int(np.argmin([error_of(candidate) for candidate in candidates]))]

    found = best([(low * s, high * s) for s in _COARSE])
    if not symmetric:
        found = best([(found[0] * s, found[1]) for s in (1.0, *_COARSE)] + [(low * s, found[1]) for s in _COARSE])
        found = best([(found[0], high * s) for s in _COARSE] + [found])
        return best([(max(low, found[0] * a), min(high, found[1] * b)) for a in _FINE for b in _FINE])
    return best([(max(low, found[0] * s), min(high, found[1] * s)) for s in _FINE])


def error(
    centers: Floats, counts: Floats, width: float, span: tuple[float, float], symmetric: bool, options: Options
) -> float:
    """Expected error of one candidate. Inside, rounding is uniform noise of one step; outside, it is the clipped part."""
    low, high = span
    power = options.power
    half, steps = 2 ** (options.bits - 1), 2**options.bits - 1
    step = high / (half - 1) if symmetric else (high - low) / steps
    if step <= 0:
        return float("inf")
    first = -half if symmetric else -np.clip(np.round(-low / step), 0, steps)
    quantized = np.clip(np.round(centers / step), first, first + steps) * step
    if step < 4 * width:  # the bins are too coarse to show the rounding: take its expectation
        outside = np.maximum(np.maximum(low - centers, centers - high), 0)
        inside = (step / 2) ** power / (power + 1)
        return float((counts * np.maximum(outside**power, inside)).sum())
    return float((counts * np.abs(centers - quantized) ** power).sum())
