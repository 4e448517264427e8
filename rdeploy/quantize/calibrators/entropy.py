"""Entropy: the clipping range whose quantized histogram loses the least information (KL divergence).

The procedure is NVIDIA's ("8-bit Inference with TensorRT", GTC 2017), on the distribution of absolute values; the affine
scheme keeps the sides' own extremes where they are smaller than the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rdeploy.errors import ConfigError
from rdeploy.quantize.calibrators import minmax
from rdeploy.quantize.histogram import Floats, Histogram

_SATURATED = 0.002
"""A share of values this large in the very last bin is where a Clip (ReLU6) saturates: the range's end is real."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`stride`: how many bins lie between two candidate thresholds. `bits` make the levels."""

    stride: int = 16
    bits: int = 8

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ConfigError(f"calibrator entropy: stride {self.stride} must be at least 1")
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"calibrator entropy: {self.bits} bits; 2 to 8 can be simulated")


def find_range(histogram: Histogram, options: Options, *, symmetric: bool) -> tuple[float, float]:
    """Return the range with the least KL divergence between the clipped and the quantized distribution."""
    low, high = minmax.find_range(histogram, minmax.Options(), symmetric=symmetric)
    half = histogram.bins // 2
    if not histogram.counts.size:
        return low, high
    mass = histogram.counts[half:] + histogram.counts[:half][::-1]
    last = int(np.flatnonzero(mass)[-1]) + 1 if mass.any() else 0
    levels = 2 ** (options.bits - 1)
    if last <= levels or mass[last - 1] > _SATURATED * mass.sum():
        return low, high
    candidates = [*range(levels, last, options.stride), last]
    scores = [_divergence(mass[:last].astype(np.float64), candidate, levels) for candidate in candidates]
    threshold = candidates[int(np.argmin(scores))] * (histogram.limit / half)
    return max(low, -threshold), min(high, threshold)


def _divergence(mass: Floats, edge: int, levels: int) -> float:
    """KL(P || Q): P is the mass below `edge` with the rest clipped into the last bin, Q is P on `levels` levels."""
    reference = mass[:edge].copy()
    filled = reference > 0
    level = np.arange(edge) * levels // edge
    total = np.bincount(level, weights=reference, minlength=levels)
    occupied = np.bincount(level, weights=filled, minlength=levels)
    quantized = np.where(filled, (total / np.maximum(occupied, 1))[level], 0.0)
    reference[-1] += mass[edge:].sum()
    p = reference / reference.sum()
    q = np.maximum(quantized / max(quantized.sum(), 1e-30), 1e-12)
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
