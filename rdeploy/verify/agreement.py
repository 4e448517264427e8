"""Compare a variant's answers with the native model's at its own resolution: what the whole variant changes."""

from __future__ import annotations

import numpy as np

from rdeploy.errors import InvariantError
from rdeploy.metrics import detection, embedding
from rdeploy.metrics.intervals import bootstrap_interval, mean_interval, wilson_interval
from rdeploy.metrics.outputs import Outputs
from rdeploy.results import Accuracy
from rdeploy.verify.answers import Array, boxes_by_image, decisions


def agree(outputs: Outputs, native: Outputs, task: str = "classification") -> Accuracy | None:
    """Return how well the variant answers as the native model does; None where the outputs hold no answers.

    classification: the share of images with the same class, Wilson's interval. segmentation: the share of pixels with
    the same class (maps of another size on the native grid, nearest), bootstrap interval over images. embedding: the
    mean cosine similarity, bootstrap interval over images. detection: the share of both models' detections (score at
    least 0.25) that the other has too, of the same class and at an IoU of at least 0.5.

    Raises:
        InvariantError: the two do not hold the same number of images, classes or features.
    """
    if task == "detection":
        return _same_boxes(outputs, native)
    mine, theirs = outputs.arrays[0], native.arrays[0]
    if mine.shape[:2] != theirs.shape[:2] or mine.ndim != theirs.ndim:
        raise InvariantError(f"the variant's outputs {mine.shape} do not fit the native model's {theirs.shape}")
    if task == "embedding":
        cosines = embedding.cosines(mine, theirs)
        return _unlabelled("cosine", float(cosines.mean()), mean_interval(cosines), len(mine))
    if outputs.decisions is not None and native.decisions is not None:
        shares = same_pixels(outputs.decisions, native.decisions)
        return _unlabelled("agreement", float(shares.mean()), mean_interval(shares), len(mine))
    if task != "classification" or mine.ndim != 2:
        return None
    value = float(np.mean(decisions(mine) == decisions(theirs)))
    return _unlabelled("agreement", value, wilson_interval(value, len(mine)), len(mine))


def _same_boxes(outputs: Outputs, native: Outputs) -> Accuracy:
    """Return the share of both models' detections that the other has too, with its bootstrap interval over images."""
    pairs = [detection.matched(mine, theirs) for mine, theirs in zip(boxes_by_image(outputs), boxes_by_image(native))]
    counts = np.array([[2 * same, both] for same, both in pairs], dtype=np.float64)

    def share(sums: Array) -> Array:
        return np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(sums[:, 1], 1), 1.0)

    value = float(share(counts.sum(axis=0)[None])[0])
    return _unlabelled("agreement", value, bootstrap_interval(counts, share), len(outputs))


def _unlabelled(metric: str, value: float, interval: tuple[float, float], samples: int) -> Accuracy:
    return Accuracy(
        metric=metric, value=value, reference=1.0, drop=1.0 - value, ci95=interval, samples=samples, labelled=False
    )


def same_pixels(mine: Array, native: Array) -> Array:
    """Return for each image the share of the native map's pixels that the other map gives the same class."""
    same = np.empty(len(native))
    for index in range(len(native)):
        same[index] = float(
            np.mean(on_grid(mine[index : index + 1], native[index : index + 1].shape)[0] == native[index])
        )
    return same


def on_grid(classes: Array, shape: tuple[int, ...]) -> Array:
    """Sample (N, h, w) class maps at the nearest pixels of another grid; (N,) and equal sizes pass through."""
    if classes.ndim != 3 or classes.shape == shape:
        return classes
    rows = (np.arange(shape[1]) * 2 + 1) * classes.shape[1] // (2 * shape[1])
    columns = (np.arange(shape[2]) * 2 + 1) * classes.shape[2] // (2 * shape[2])
    return classes[:, rows[:, None], columns[None, :]]
