"""Gradient: the range with the least error at the network's output, as the output's gradients tell it (`quantize/gradients.py`).

The search is that of `mse`. What differs is the error. Rounding is noise of its own in every value, so a value counts by the
square of the gradient there (the diagonal of a Gauss-Newton Hessian, as PTQ4ViT weighs its ranges). Clipping is not: it takes
from all large values of an image at once, and what the output feels of it is the sum, gradient by gradient, squared. That is
seen on few images, and a few of them are most of it: the mean that counts is the upper end of its interval, or the range would
fit these images and clip the next. Where no gradient can be had values count by their channels, and this is `mse`.
"""

from __future__ import annotations

import numpy as np

from rdeploy.quantize.calibrators import mse
from rdeploy.quantize.calibrators.mse import Options
from rdeploy.quantize.histogram import Floats, Histogram

__all__ = ["Options", "find_range"]
_ERRORS = 2.0
"""So many standard errors above the mean."""


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return the range with the least expected squared error at the network's output, to first order.

    Of an error to another power than 2 there is no sum that the output feels: each value counts for itself.
    """
    if not histogram.felt or options.power != 2:
        return mse.find_range(histogram, options, symmetric=symmetric)
    centers, counts = histogram.filled()
    counts = counts / len(histogram.felt)
    width = 2 * histogram.limit / histogram.bins
    felt, middles = np.stack(histogram.felt), histogram.coarse_centers

    def error(span: tuple[float, float]) -> float:
        alone = mse.error(centers, counts, width, span, symmetric, options)
        return alone - float(counts @ np.square(_cut(centers, span))) + _upper(np.square(felt @ _cut(middles, span)))

    return mse.search(histogram, error, symmetric=symmetric)


def _upper(squares: Floats) -> float:
    """Return the upper end of the mean's 95 % interval."""
    return float(squares.mean() + _ERRORS * squares.std() / np.sqrt(squares.size))


def _cut(values: Floats, span: tuple[float, float]) -> Floats:
    """Return what clipping takes from each value."""
    cut: Floats = values - np.clip(values, *span)
    return cut
