"""Gradient: the range with the least error at the network's output, as the output's gradients tell it (`quantize/gradients.py`).

The search is that of `mse`. What differs is the error. Rounding is noise of its own in every value, so a value counts by the
square of the gradient there (the diagonal of a Gauss-Newton Hessian, as PTQ4ViT weighs its ranges). Clipping is not: it takes
from all large values of an image at once, and what the output feels of it is the sum, gradient by gradient, squared. That is
seen on few images, and a few of them are most of it: the mean that counts is the upper end of its interval, which reaches
further where the squares are skewed (Johnson, Modified t tests and confidence intervals for asymmetrical populations, 1978), or
the range would fit these images and clip the next. What other images hold beyond all that was seen is taken to fall off
exponentially, as the most extreme images do: a range may be a third wider than the values were. Where no gradient can be had
values count by their channels, and this is `mse`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdeploy.quantize.calibrators import mse
from rdeploy.quantize.calibrators.mse import Options
from rdeploy.quantize.gradients import PROBES
from rdeploy.quantize.histogram import Floats, Histogram

__all__ = ["Options", "find_range"]
_ERRORS = 3.0
"""So many standard errors above the mean, where squares are not skewed."""
_BEYOND = 4 / 3
"""How far a range may go beyond what was seen."""
_EXTREME = 8
"""So many of the most extreme images, or a tenth of all, tell how values fall off."""


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return the range with the least expected squared error at the network's output, to first order.

    Of an error to another power than 2 there is no sum that the output feels: each value counts for itself.
    """
    if not histogram.felt or options.power != 2:
        return mse.find_range(histogram, options, symmetric=symmetric)
    centers, counts = histogram.filled()
    counts = counts / len(histogram.felt)
    width = 2 * histogram.limit / histogram.bins
    felt, middles = np.stack(histogram.felt).astype(np.float64), histogram.coarse_centers
    tails = _tails(felt, middles, histogram)

    def error(span: tuple[float, float]) -> float:
        alone = mse.error(centers, counts, width, span, symmetric, options)
        rounding = alone - float(counts @ np.square(_cut(centers, span)))
        return rounding + _upper(np.square(felt @ _cut(middles, span))) + sum(tail.beyond(span) for tail in tails)

    return mse.search(histogram, error, symmetric=symmetric, beyond=_BEYOND)


def _upper(squares: Floats) -> float:
    """Return the upper end of the interval of the mean over images, from what each felt in each direction."""
    images = squares.reshape(-1, PROBES).mean(axis=1)
    mean, spread, root = images.mean(), images.std(), np.sqrt(images.size)
    if spread == 0:
        return float(mean)
    skewed = np.mean(((images - mean) / spread) ** 3) * (1 + 2 * _ERRORS**2) / (6 * root)
    return float(mean + (_ERRORS + skewed) * spread / root)


def _cut(values: Floats, span: tuple[float, float]) -> Floats:
    """Return what clipping takes from each value."""
    cut: Floats = values - np.clip(values, *span)
    return cut


@dataclass(frozen=True, slots=True)
class _Tail:
    """What images hold beyond `end`, the most extreme value of the `images` whose gradients are known.

    One more image goes beyond it once in `images` + 1 times, by `excess` on average, and `power` is what the output then feels.
    """

    end: float
    excess: float
    power: float
    images: int

    def beyond(self, span: tuple[float, float]) -> float:
        """Return the expected square of what the output feels of the values beyond `end` and beyond `span`."""
        further = span[1] - self.end if self.end > 0 else self.end - span[0]
        return self.power / (self.images + 1) * float(np.exp(-max(0.0, further) / self.excess))


def _tails(felt: Floats, middles: Floats, histogram: Histogram) -> list[_Tail]:
    """Return the tail of each end that values thin out towards: a ReLU's zero and a saturated Clip are none.

    Values fall off as the most extreme images do, and no faster than from the images whose gradients are known to all that were
    seen: of N + 1 images one goes beyond what N hold.
    """
    found, width = [], 2 * histogram.limit / middles.size
    known, ratio = felt.reshape(-1, PROBES, middles.size)[:, 0], (histogram.batches + 1) / (len(felt) / PROBES + 1)
    for end in (histogram.low, histogram.high):
        side = middles * end > 0
        reached = np.sort(np.where(known[:, side] != 0, np.abs(middles[side]), 0.0).max(axis=1, initial=0.0))
        extreme = reached[-max(_EXTREME, len(reached) // 10) :]
        excess = float((extreme - extreme[0]).mean())
        if excess <= width:
            continue
        squares = np.square(felt[:, side] @ np.maximum(np.abs(middles[side]) - extreme[0], 0.0))
        power, most = float(squares[squares > 0].mean()), min(float(reached[-1]) + width / 2, abs(end))
        seen = (abs(end) - most) / np.log(ratio) if ratio > 1 else 0.0
        longer = max(1.0, seen / excess)
        found.append(_Tail(np.sign(end) * most, longer * excess, longer**2 * power, len(known)))
    return found
