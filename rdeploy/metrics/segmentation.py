"""Segmentation: class scores and masks go in, per-image counts and the mean intersection over union come out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import ConfigError
from rdeploy.metrics.intervals import Interval, bootstrap_interval

Array = NDArray[Any]
Box = tuple[float, float, float, float]


def classes_of(scores: Array) -> Array:
    """Return the class of each pixel, int16 (N, H, W), of scores (N, C, H, W); -1 where one is NaN. One channel: its sign."""
    yes_or_no = scores.shape[1] == 1
    found: Array = (scores[:, 0] > 0 if yes_or_no else np.argmax(scores, axis=1)).astype(np.int16)
    broken = ~np.isfinite(scores.sum(axis=1))
    if broken.any():
        found[np.isnan(scores).any(axis=1)] = -1
    return found


def number_of_classes(channels: int) -> int:
    """Return how many classes a number of score channels tells apart: one channel is yes or no."""
    return max(2, channels)


def on_mask(scores: Array, shape: tuple[int, int], box: Box) -> tuple[Array, tuple[slice, slice]]:
    """Return the class of each pixel of a mask that the network saw, and which pixels these are.

    Args:
        scores: (C, h, w) of one image; they are enlarged bilinearly (half-pixel centres) before the decision.
        shape: the mask's (H, W).
        box: what the network saw, (top, left, bottom, right) in the mask's pixels.
    """
    top, left, bottom, right = box
    rows = slice(max(0, round(top)), min(shape[0], round(bottom)))
    columns = slice(max(0, round(left)), min(shape[1], round(right)))
    y = (np.arange(rows.start, rows.stop) + 0.5 - top) * (scores.shape[1] / (bottom - top)) - 0.5
    x = (np.arange(columns.start, columns.stop) + 0.5 - left) * (scores.shape[2] / (right - left)) - 0.5
    enlarged = _between(_between(scores, y, 1), x, 2)
    return classes_of(enlarged[None])[0], (rows, columns)


def _between(values: Array, positions: Array, axis: int) -> Array:
    """Sample linearly along an axis; positions outside take the border's value."""
    last = values.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    low = np.floor(positions).astype(np.int64)
    if np.array_equal(positions, low):
        return values if len(low) == last + 1 and (low == np.arange(last + 1)).all() else values.take(low, axis)
    high = np.minimum(low + 1, last)
    weight = (positions - low).astype(np.float32).reshape([-1 if axis == i else 1 for i in range(values.ndim)])
    first: Array = values.take(low, axis)
    second: Array = values.take(high, axis)
    between: Array = first + weight * (second - first)
    return between


def count(predicted: Array, mask: Array, classes: int, void: Collection[int]) -> Array:
    """Return int64 (3, classes) of one image: pixels right, pixels of each class in the mask, pixels predicted as it.

    Pixels whose mask is void count nowhere; a prediction of -1 is wrong.

    Raises:
        ConfigError: the mask holds a value that is neither a class nor void.
    """
    counted = ~np.isin(mask, list(void))
    truth, found = mask[counted].astype(np.int64), predicted[counted].astype(np.int64)
    if truth.size and truth.max() >= classes:
        raise ConfigError(
            f"a mask holds class {int(truth.max())}, but the model has {classes} classes (0 to {classes - 1}); "
            f"if it means no class, say so with --void {int(truth.max())}"
        )
    right = np.bincount(truth[truth == found], minlength=classes)
    return np.stack([right, np.bincount(truth, minlength=classes), np.bincount(found[found >= 0], minlength=classes)])


def mean_iou(counts: Array) -> Array:
    """Return the mean intersection over union (B,) of summed counts (B, 3, C), over the classes that occur at all."""
    right, truth, found = (counts[:, index].astype(np.float64) for index in range(3))
    union = truth + found - right
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(union > 0, right / union, np.nan)
    there = np.isfinite(each).sum(axis=1)
    return np.where(there > 0, np.nansum(each, axis=1) / np.maximum(there, 1), np.nan)


def miou(counts: Array, *, seed: int = 0) -> tuple[float, Interval]:
    """Return the mean intersection over union of per-image counts (N, 3, C), with its bootstrap interval over images."""
    return float(mean_iou(counts.sum(axis=0)[None])[0]), bootstrap_interval(counts, mean_iou, seed=seed)


def miou_lost(counts: Array, native: Array, *, seed: int = 0) -> Interval:
    """Return the interval of how much mIoU is lost against the native model's counts, both resampled on the same images."""

    def lost(sums: Array) -> Array:
        difference: Array = mean_iou(sums[:, 1]) - mean_iou(sums[:, 0])
        return difference

    return bootstrap_interval(np.stack([counts, native], axis=1), lost, seed=seed)
