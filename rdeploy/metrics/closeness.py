"""How close each single answer is to the native model's, or to the label: what a choice between two variants is made by.

Raw outputs of a batch become compact answers (`answers`), two sets of answers become a number an image (`closeness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.metrics import detection, embedding, segmentation
from rdeploy.metrics.intervals import Interval, mean_interval

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Closeness:
    """Two numbers an image, larger is better.

    `decided` is what is reported: whether the class is the same, the share of the pixels or boxes that are, the cosine.
    `smooth` tells more about a few images: for classes the log-likelihood of the native model's distribution (or of the
    label), up to a constant; for everything else `decided` is smooth already.
    """

    decided: Array
    smooth: Array

    def __len__(self) -> int:
        return len(self.decided)

    @property
    def share(self) -> float:
        """The mean over the images of what is reported."""
        return float(self.decided.mean())

    @property
    def order(self) -> tuple[float, float]:
        """What to compare by: the reported share first, the smooth one between equals."""
        return round(self.share, 9), float(self.smooth.mean())


@dataclass(frozen=True, slots=True)
class Gain:
    """How much more is right with a change than without it, in fractions, with the interval of the paired difference."""

    value: float
    ci95: Interval

    @staticmethod
    def between(before: Closeness, after: Closeness) -> Gain:
        difference = after.decided.astype(np.float64) - before.decided
        return Gain(float(difference.mean()), mean_interval(difference))


def helps(before: Closeness, after: Closeness) -> bool:
    """Whether a change is worth keeping: more is right, and the smooth measure does not deny it."""
    return after.share > before.share and float(after.smooth.mean()) >= float(before.smooth.mean())


def answers(rows: Sequence[Array], *, task: str, names: Sequence[str] = (), frame: tuple[int, int]) -> list[Array]:
    """Return the answer of each image of a batch: logits, the classes of the pixels, a vector, or the boxes.

    Args:
        rows: one array an output, the images first.
        frame: the size (h, w) in whose pixels a detector's boxes are.
    """
    if task == "detection":
        return detection.decode(rows, names, frame)
    if task == "segmentation" and rows[0].ndim == 4:
        return list(segmentation.classes_of(rows[0]))
    return [np.array(row, dtype=np.float32) for row in rows[0]]


def closeness(
    mine: Sequence[Array], native: Sequence[Array], *, task: str, labels: Sequence[int] | None = None
) -> Closeness:
    """Compare answers image by image with the native model's, or with the labels of a classifier's images."""
    if task == "classification" and np.ndim(mine[0]) == 1:
        return _classes(np.stack(mine), np.stack(native), labels)
    if task == "detection":
        found = np.array([_same_boxes(a, b) for a, b in zip(mine, native)])
    elif task == "segmentation":
        found = np.array([float(np.mean(a == b)) for a, b in zip(mine, native)])
    else:
        found = embedding.cosines(np.stack(mine), np.stack(native))
    return Closeness(found, found)


def _classes(mine: Array, native: Array, labels: Sequence[int] | None) -> Closeness:
    mine, native = _log_softmax(mine), _log_softmax(native)
    if labels is not None:
        truth = np.asarray(labels, dtype=np.int64)
        return Closeness((mine.argmax(axis=1) == truth).astype(np.float64), mine[np.arange(len(mine)), truth])
    same = (mine.argmax(axis=1) == native.argmax(axis=1)).astype(np.float64)
    return Closeness(same, (np.exp(native) * mine).sum(axis=1))


def _log_softmax(logits: Array) -> Array:
    """Return log-probabilities, float64; one column is the logit of yes against no."""
    values = np.nan_to_num(logits.astype(np.float64), nan=-1e9, posinf=1e9, neginf=-1e9)
    if values.shape[1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=1)
    values = values - values.max(axis=1, keepdims=True)
    found: Array = np.maximum(values - np.log(np.exp(values).sum(axis=1, keepdims=True)), -100.0)
    return found


def _same_boxes(mine: Array, theirs: Array) -> float:
    pairs, both = detection.matched(mine, theirs)
    return 2 * pairs / both if both else 1.0
