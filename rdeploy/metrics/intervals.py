"""95 % intervals over images: Wilson's for shares, the bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Interval = tuple[float, float]

RESAMPLES = 1000
_Z95 = 1.959963984540054
_PIECE = 100


def wilson_interval(share: float, samples: int) -> Interval:
    """Return the Wilson score interval (95 %) of a proportion: honest for few samples and at 0 and 1 (Wilson 1927)."""
    if samples == 0:
        return 0.0, 1.0
    spread = _Z95**2 / samples
    middle = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(counts: Array, metric: Callable[[Array], Array], *, seed: int = 0) -> Interval:
    """Return the percentile interval of a metric of sums over images, resampling whole images.

    Args:
        counts: (N, ...), what each image adds to the sums.
        metric: maps a stack of sums (B, ...) to (B,) values.
    """
    number = len(counts)
    flat = counts.reshape(number, -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    values: list[Array] = []
    for _ in range(RESAMPLES // _PIECE):
        often = rng.multinomial(number, np.full(number, 1.0 / number), size=_PIECE).astype(np.float64)
        values.append(metric((often @ flat).reshape(_PIECE, *counts.shape[1:])))
    low, high = np.nanpercentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Array, *, seed: int = 0) -> Interval:
    """Return the bootstrap interval of the mean of one value an image."""
    return bootstrap_interval(values[:, None], lambda sums: sums[:, 0] / len(values), seed=seed)
