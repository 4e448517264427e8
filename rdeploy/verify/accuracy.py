"""Score outputs by what is known to be true: classes, masks, boxes. The native model is scored on the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdeploy.errors import ConfigError
from rdeploy.metrics import coco, segmentation
from rdeploy.metrics.intervals import wilson_interval
from rdeploy.metrics.outputs import Outputs
from rdeploy.results import Accuracy
from rdeploy.verify.answers import Array, boxes_by_image, decisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """True boxes, (K, 5) an image, relative to it; the network's are in pixels of `frame` (h, w) and see all of it."""

    boxes: tuple[Array, ...]
    frame: tuple[int, int]


def score(
    outputs: Outputs,
    *,
    task: str,
    native: Outputs | None = None,
    labels: Sequence[int] | None = None,
    truth: Truth | None = None,
) -> Accuracy | None:
    """Return the task's own metric against the labels, masks or boxes; None where there are none."""
    if truth is not None:
        return average_precision(outputs, native, truth)
    if outputs.counts is not None:
        return miou(outputs.counts, None if native is None else native.counts)
    if labels is None or task != "classification" or outputs.arrays[0].ndim != 2:
        return None
    return top1(outputs.arrays[0], labels, None if native is None else native.arrays[0])


def top1(logits: Array, labels: Sequence[int], reference_logits: Array | None = None) -> Accuracy:
    """Return top-1 accuracy of (N, C) logits; `reference` is the native model's on the same images.

    `ci95` is the Wilson interval of `value` itself, not of the drop. A row with NaN counts as wrong. Without
    `reference_logits` the logits are the native model's own, and nothing is dropped.

    Raises:
        ConfigError: the labels do not fit the logits (their number, or a class that the model does not have).
    """
    truth = _checked_labels(logits, labels)
    value = float(np.mean(decisions(logits) == truth))
    reference = value
    if reference_logits is not None:
        reference = float(np.mean(decisions(reference_logits) == _checked_labels(reference_logits, labels)))
    return Accuracy(
        metric="top1",
        value=value,
        reference=reference,
        drop=reference - value,
        ci95=wilson_interval(value, len(truth)),
        samples=len(truth),
        labelled=True,
    )


def miou(counts: Array, reference_counts: Array | None = None) -> Accuracy:
    """Return the mean intersection over union of per-image counts (N, 3, C), at the masks' own resolution.

    `ci95` is the bootstrap interval of `value` over images, `drop_ci95` that of the drop against the native model's on the
    same masks.
    """
    value, interval = segmentation.miou(counts)
    reference = value if reference_counts is None else segmentation.miou(reference_counts)[0]
    return Accuracy(
        metric="miou",
        value=value,
        reference=reference,
        drop=reference - value,
        ci95=interval,
        samples=len(counts),
        labelled=True,
        drop_ci95=None if reference_counts is None else segmentation.miou_lost(counts, reference_counts),
    )


def average_precision(outputs: Outputs, native: Outputs | None, truth: Truth) -> Accuracy:
    """Return the mAP at IoU 0.50 to 0.95; `ci95` is the bootstrap interval of `value` over images."""
    height, width = truth.frame
    scale = np.array([width, height, width, height, 1.0, 1.0])  # overlaps do not depend on the unit of an axis
    relative = [boxes / scale for boxes in boxes_by_image(outputs)]
    mine = coco.mean_average_precision(relative, truth.boxes)
    theirs = mine
    if native is not None:
        theirs = coco.mean_average_precision([boxes / scale for boxes in boxes_by_image(native)], truth.boxes)
    return Accuracy(
        metric="map",
        value=mine.value,
        reference=theirs.value,
        drop=theirs.value - mine.value,
        ci95=mine.ci95,
        samples=len(truth.boxes),
        labelled=True,
        drop_ci95=None if native is None else coco.lost(mine, theirs),
    )


def _checked_labels(logits: Array, labels: Sequence[int]) -> Array:
    if logits.ndim != 2:
        raise ConfigError(f"labels need one row of class scores an image, the model's output has shape {logits.shape}")
    if len(labels) != len(logits):
        raise ConfigError(f"{len(labels)} labels for {len(logits)} images; give one label an image")
    truth = np.asarray(labels, dtype=np.int64)
    classes = max(2, logits.shape[1])
    if len(truth) and not 0 <= truth.min() <= truth.max() < classes:
        wrong = int(truth.max() if truth.max() >= classes else truth.min())
        raise ConfigError(f"label {wrong} is not a class of this model (0 to {classes - 1}); check the labels")
    return truth
