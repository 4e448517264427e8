"""Rounding with error feedback: choose every layer's integers for what the layer puts out, not weight by weight.

With q what the quantized network gives a layer and x what it should have got, the layer's new weights minimise
E |W x + b - (V q + c)|^2: the real-valued optimum is W E[x q'] / E[q q'] (both centred; the bias c takes the means), which takes
back what the layers before have done wrong; then one input after the other is rounded and its error passed on to the
inputs that are still free, by the inverse of E[q q'] (Frantar et al., "GPTQ", ICLR 2023). Layers are taken in graph order,
so that each sees the network as it will be. Second moments are all that is kept of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Refine = Callable[[Floats, Floats, Floats, Floats, int], Floats]
"""(wanted, hessian, scales, integers, largest) -> integers with no more error."""
_CLIPS = np.linspace(1.0, 0.4, 25)
_DAMPING = 0.01
_STRENGTHS = (np.inf, 10.0, 1.0, 0.1, 0.01)


@dataclass(slots=True)
class Moments:
    """Sums over samples of what a layer's outputs see, one row of weights long: (groups, inputs) and (groups, inputs, inputs)."""

    count: int
    exact: Floats
    rounded: Floats
    square: Floats
    cross: Floats

    @staticmethod
    def empty(groups: int, inputs: int) -> Moments:
        """Return moments of nothing."""
        shape = (groups, inputs, inputs)
        return Moments(0, np.zeros(shape[:2]), np.zeros(shape[:2]), np.zeros(shape), np.zeros(shape))

    def add(self, exact: NDArray[np.floating], rounded: NDArray[np.floating]) -> None:
        """Take in samples (groups, samples, inputs) of the exact and of the quantized network."""
        self.count += exact.shape[1]
        self.exact += exact.sum(axis=1, dtype=np.float64)
        self.rounded += rounded.sum(axis=1, dtype=np.float64)
        turned = rounded.transpose(0, 2, 1)
        self.square += turned @ rounded
        self.cross += turned @ exact

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.exact + other.exact,
            self.rounded + other.rounded,
            self.square + other.square,
            self.cross + other.cross,
        )

    def centred(self, *, biased: bool) -> tuple[Floats, Floats]:
        """Return Cov(q, q) and Cov(q, x), about zero for a layer that has no bias to take the means."""
        count = max(self.count, 1)
        x, q = (self.exact / count, self.rounded / count) if biased else (np.zeros(1), np.zeros(1))
        square, cross = self.square / count, self.cross / count
        if not biased:
            return square, cross
        return square - q[:, :, None] * q[:, None, :], cross - q[:, :, None] * x[:, None, :]


def solve(
    weight: Floats,
    halves: tuple[Moments, Moments],
    weight_max: int,
    *,
    biased: bool = True,
    refine: Refine | None = None,
) -> tuple[NDArray[np.int8], Floats]:
    """Return integers like `weight` (groups, outputs, inputs), and a scale per output.

    `halves` are the moments over two halves of the images: what one half teaches has to hold on the other.
    """
    moments = halves[0] + halves[1]
    square, cross = moments.centred(biased=biased)
    mean = np.maximum(np.einsum("gii->gi", square).mean(axis=1), 1e-12)[:, None, None]
    identity = np.eye(weight.shape[2])
    wanted = weight + _taken_back(weight, square, cross, mean * _strength(weight, halves, biased=biased))
    damping = max(_DAMPING, min(1.0, weight.shape[2] / max(moments.count, 1)))
    hessian = square + identity * mean * damping
    values, scales = _rounded(wanted, hessian, weight_max)
    if refine is not None:
        values = refine(wanted, hessian, scales, values, weight_max)
    return values.astype(np.int8), scales


def _taken_back(weight: Floats, square: Floats, cross: Floats, damping: Floats) -> Floats:
    """Return the change of the weights that takes back what the quantized inputs say of the error so far."""
    if not np.isfinite(damping).all():
        return np.zeros_like(weight)
    damped = square + np.eye(weight.shape[2]) * damping
    return np.asarray(np.linalg.solve(damped, (cross - square) @ weight.transpose(0, 2, 1)).transpose(0, 2, 1))


def _strength(weight: Floats, halves: tuple[Moments, Moments], *, biased: bool) -> float:
    """Return the damping, in units of the mean power, with the least error on the half that it was not fitted to."""
    errors = np.zeros(len(_STRENGTHS))
    for fitted, held in (halves, halves[::-1]):
        square, cross = fitted.centred(biased=biased)
        other, other_cross = held.centred(biased=biased)
        mean = np.maximum(np.einsum("gii->gi", square).mean(axis=1), 1e-12)[:, None, None]
        for index, strength in enumerate(_STRENGTHS):
            change = _taken_back(weight, square, cross, mean * strength)
            # E |W x - (W + D) q|^2 without what does not depend on D
            pull = weight @ (other_cross - other).transpose(0, 2, 1)
            errors[index] += float(((change @ other) * change).sum() - 2 * (change * pull).sum())
    return float(_STRENGTHS[int(np.argmin(errors))])


def _rounded(wanted: Floats, hessian: Floats, weight_max: int) -> tuple[Floats, Floats]:
    """Round every row at the scale that suits it best; inputs with the largest moments come first."""
    order = np.argsort(-np.einsum("gii->gi", hessian), axis=1)
    rows = np.take_along_axis(wanted, order[:, None, :], axis=2)
    sorted_ = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], 1), order[:, None, :], 2)
    feedback = np.linalg.cholesky(np.linalg.inv(sorted_)).transpose(0, 2, 1)  # upper factor of the inverse
    scales = _scales(rows, np.einsum("gii->gi", sorted_), weight_max)
    values = _feed_back(rows, feedback, scales, weight_max)
    back = np.argsort(order, axis=1)
    return np.take_along_axis(values, back[:, None, :], axis=2), scales


def _scales(rows: Floats, power: Floats, weight_max: int) -> Floats:
    """Return the scale of each row with the least rounding error, every input weighed by its power."""
    peak = np.maximum(np.abs(rows).max(axis=2), 1e-8 * weight_max)
    best, scales = np.full(peak.shape, np.inf), peak / weight_max
    for clip in _CLIPS:
        scale = (peak * clip / weight_max)[:, :, None]
        off = np.clip(np.rint(rows / scale), -weight_max, weight_max) * scale - rows
        error = (np.square(off) * power[:, None, :]).sum(axis=2)
        best, scales = np.where(error < best, error, best), np.where(error < best, scale[:, :, 0], scales)
    return np.asarray(scales)


def _feed_back(rows: Floats, factor: Floats, scale: Floats, weight_max: int, block: int = 64) -> Floats:
    """Round the columns of `rows` (groups, outputs, inputs) in order, each error spread over the columns behind it."""
    left, values = rows.copy(), np.empty_like(rows)
    size = rows.shape[2]
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = np.empty((*rows.shape[:2], end - start))
        for i in range(start, end):
            values[:, :, i] = np.clip(np.rint(left[:, :, i] / scale), -weight_max, weight_max)
            error = (left[:, :, i] - values[:, :, i] * scale) / factor[:, i, i, None]
            left[:, :, i + 1 : end] -= error[:, :, None] * factor[:, None, i, i + 1 : end]
            errors[:, :, i - start] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    return np.asarray(values)
