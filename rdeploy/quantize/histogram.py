"""A streaming histogram of one tensor: fixed memory, one pass, exact extremes; what every range search looks at."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COARSE = 1024
_CHUNK = 1 << 18
_MOVED = 0.02


@dataclasses.dataclass(slots=True)
class Histogram:
    """Counts over [-limit, limit] in `bins` equal bins; `limit` doubles (pairs of bins merge) when a value falls outside.

    The minimum and maximum are over all values. The counts are over at most `sample` values a batch, taken with an even
    stride, because a range needs the shape of a distribution, not every one of millions of activations. Exact zeros are
    counted apart: after a ReLU they are most of a tensor, and every quantizer represents zero without error.
    `moved` is the batch that last widened the range by more than 2 %; `lows` and `highs` are sums of the batches' extremes.
    `weights` (one per channel of `axis`, mean 1) let a value count as much as its channel matters. No value of any image is above
    `ceiling`.
    """

    bins: int = 4096
    sample: int = 1 << 14
    weights: Floats | None = None
    axis: int = 1
    ceiling: float = np.inf
    limit: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    zeros: float = 0.0
    batches: int = 0
    moved: int = 0
    lows: float = 0.0
    highs: float = 0.0
    counts: Floats = dataclasses.field(default_factory=lambda: np.zeros(0))
    felt: Sequence[NDArray[np.float32]] = ()
    """What the output feels of the values in each of `COARSE` bins, a row for each image and direction (`feel`)."""

    def update(self, array: NDArray[np.floating]) -> None:
        """Take in one batch of any shape. Values that are not finite raise FloatingPointError."""
        flat = array.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FloatingPointError("the tensor holds NaN or infinity")
        self.batches += 1
        before = max(self.high, 0.0) - min(self.low, 0.0)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.lows, self.highs = self.lows + low, self.highs + high
        if max(self.high, 0.0) - min(self.low, 0.0) > before * (1 + _MOVED):
            self.moved = self.batches
        self._grow(max(-low, high))
        stride = even_stride(flat.size, self.sample)
        self._count(flat[::stride], self._weights_of(array.shape, stride))

    def feel(self, array: NDArray[np.float32], gradients: NDArray[np.float32]) -> None:
        """Take in one batch of values that lie within the extremes known, and the output's gradient at each of them.

        A value counts by the square of its gradient, all values of the batch together as one that is felt once.
        """
        values, slopes = array.reshape(-1), gradients.reshape(-1)
        if not self.limit:
            return
        sums = np.zeros(COARSE)
        for start in range(0, values.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            sums += np.bincount(self._index(values[part], COARSE), slopes[part], minlength=COARSE)
        self.felt = (*self.felt, sums.astype(np.float32))
        stride = even_stride(values.size, self.sample)
        self._count(values[::stride], stride * np.square(slopes[::stride], dtype=np.float64))

    def _grow(self, peak: float) -> None:
        if not self.counts.size:
            self.counts = np.zeros(self.bins)
        if self.limit == 0.0:
            self.limit = peak
        while self.limit < peak:
            self.limit *= 2
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(merged, self.bins // 4)

    def _weights_of(self, shape: tuple[int, ...], stride: int) -> Floats | None:
        """Return the weight of each sampled value, by the channel that it lies in."""
        if self.weights is None or shape[self.axis] != self.weights.size:
            return None
        return self.weights.take(_channels(shape, self.axis, stride))

    def _count(self, values: NDArray[np.floating], weights: Floats | None) -> None:
        values = np.ascontiguousarray(values)
        places = np.flatnonzero(values)
        nonzero, counted = values.take(places), None if weights is None else weights.take(places)
        self.zeros += values.size - nonzero.size if weights is None else float(weights[values == 0].sum())
        if not nonzero.size:
            return
        self.counts += np.bincount(self._index(nonzero, self.bins), counted, minlength=self.bins)

    def _index(self, values: NDArray[np.floating], bins: int) -> NDArray[np.intp]:
        """Return in which of `bins` equal bins each value lies."""
        # In float64: a float32 cannot hold the bins per unit of a tensor of denormal values.
        index = (values.astype(np.float64) * (bins / (2 * self.limit)) + bins / 2).astype(np.intp)  # zero begins a bin
        return np.clip(index, 0, bins - 1)

    @property
    def centers(self) -> Floats:
        """The middle of each bin."""
        return self._middles(self.bins)

    @property
    def coarse_centers(self) -> Floats:
        """The middle of each bin of `felt`; of the outermost, where the values end."""
        centers: Floats = np.clip(self._middles(COARSE), self.low, self.high)
        return centers

    def _middles(self, bins: int) -> Floats:
        middles: Floats = (np.arange(bins, dtype=np.float64) + 0.5) * (2 * self.limit / bins) - self.limit
        return middles

    def filled(self) -> tuple[Floats, Floats]:
        """Return (centers, counts) of the bins that hold something; both empty for an all-zero tensor."""
        kept = np.flatnonzero(self.counts)
        held: Floats = self.counts[kept]
        return self.centers[kept] if kept.size else np.zeros(0), held


@functools.lru_cache(256)
def _channels(shape: tuple[int, ...], axis: int, stride: int) -> NDArray[np.int32]:
    """Return the channel that each of the sampled values lies in."""
    positions = np.arange(0, math.prod(shape), stride)
    return (positions // math.prod(shape[axis + 1 :]) % shape[axis]).astype(np.int32)


def settled(histograms: Iterable[Histogram]) -> int:
    """Return after how many batches the ranges of 95 % of the tensors had stopped moving."""
    moved = sorted(histogram.moved for histogram in histograms)
    return moved[int(0.95 * (len(moved) - 1))] if moved else 0


def even_stride(size: int, sample: int) -> int:
    """Return the smallest stride that leaves at most `sample` values and shares no factor with `size`.

    A stride that divides a row or a channel would see the same column of every feature map.
    """
    stride = max(1, -(-size // sample))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
