"""Judge an engine by its outputs: against its variant in FP32 (parity), the labels, and the native model's answers.

Outputs are arrays (or memory maps) with one row per image, read in pieces: they need not fit in memory. What the task
is decides what an answer is: a class, the class of each pixel, a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import ConfigError, InvariantError
from rdeploy.metrics import coco, detection, embedding, segmentation
from rdeploy.metrics.intervals import bootstrap_interval, mean_interval, wilson_interval
from rdeploy.metrics.outputs import Outputs
from rdeploy.types import Accuracy, Limits, Parity, Verification

Array = NDArray[Any]

SQNR_LIMIT_DB = 200.0
"""Identical outputs have no noise; beyond float32's own precision the ratio says nothing, so it ends here."""
_PIECE_BYTES = 8 << 20
_ONE_CLASS = 0.95
_MANY_CLASSES = 0.75
_FEW_IMAGES = 8
_ALIKE, _UNLIKE = 0.99, 0.9


def parity(outputs: Outputs, reference: Outputs, *, task: str = "classification") -> Parity:
    """Compare an engine's outputs with those of the same variant in FP32; of several outputs the worst one counts.

    `sqnr_db` is 10 log10(sum ref^2 / sum (ref - out)^2), within +-200; `top1_agreement` is per image for the (N, C) of a
    classifier, per pixel where there are pixel decisions, else None.

    Raises:
        InvariantError: the shapes differ, or the outputs hold NaN or infinity (`collapse` says so in words).
    """
    if len(outputs.arrays) != len(reference.arrays):
        raise InvariantError(f"the engine has {len(outputs.arrays)} outputs, the FP32 variant {len(reference.arrays)}")
    each = [_parity_of(mine, exact) for mine, exact in zip(outputs.arrays, reference.arrays)]
    return replace(
        each[0],
        max_abs_err=max(one.max_abs_err for one in each),
        cosine=min(one.cosine for one in each),
        sqnr_db=min(one.sqnr_db for one in each),
        top1_agreement=_top1_agreement(outputs, reference, task),
    )


def _parity_of(outputs: Array, reference: Array) -> Parity:
    _check_same_shape(outputs, reference)
    worst, noise, signal, energy, dot = 0.0, 0.0, 0.0, 0.0, 0.0
    for piece in _pieces(outputs):
        out, ref = outputs[piece].astype(np.float64), reference[piece].astype(np.float64)
        if not np.isfinite(out).all():
            raise InvariantError("parity is not defined for outputs with NaN or infinity")
        error = ref - out
        worst = max(worst, float(np.abs(error).max(initial=0.0)))
        noise += float(np.vdot(error, error))
        signal += float(np.vdot(ref, ref))
        energy += float(np.vdot(out, out))
        dot += float(np.vdot(ref, out))
    return Parity(
        max_abs_err=worst,
        cosine=_cosine(dot, signal, energy),
        sqnr_db=_decibel(signal, noise),
        top1_agreement=None,
        samples=len(outputs),
    )


def accuracy(logits: Array, labels: Sequence[int], reference_logits: Array | None = None) -> Accuracy:
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


def segmentation_accuracy(counts: Array, reference_counts: Array | None = None) -> Accuracy:
    """Return the mean intersection over union of per-image counts (N, 3, C), at the masks' own resolution.

    `ci95` is the bootstrap interval of `value` over images; `reference` is the native model's on the same masks.
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
    )


def agreement(outputs: Outputs, native: Outputs, task: str = "classification") -> Accuracy | None:
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
        return _agreement("cosine", float(cosines.mean()), mean_interval(cosines), len(mine))
    if outputs.decisions is not None and native.decisions is not None:
        shares = _same_pixels(outputs.decisions, native.decisions)
        return _agreement("agreement", float(shares.mean()), mean_interval(shares), len(mine))
    if task != "classification" or mine.ndim != 2:
        return None
    value = float(np.mean(decisions(mine) == decisions(theirs)))
    return _agreement("agreement", value, wilson_interval(value, len(mine)), len(mine))


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """True boxes, (K, 5) an image, relative to it; the network's are in pixels of `frame` (h, w) and see all of it."""

    boxes: tuple[Array, ...]
    frame: tuple[int, int]


def detection_accuracy(outputs: Outputs, native: Outputs | None, truth: Truth) -> Accuracy:
    """Return the mAP at IoU 0.50 to 0.95; `ci95` is the bootstrap interval of `value` over images."""
    height, width = truth.frame
    scale = np.array([width, height, width, height, 1.0, 1.0])  # overlaps do not depend on the unit of an axis
    relative = [boxes / scale for boxes in _by_image(outputs)]
    value, interval = coco.mean_average_precision(relative, truth.boxes)
    reference = value
    if native is not None:
        reference = coco.mean_average_precision([boxes / scale for boxes in _by_image(native)], truth.boxes)[0]
    return Accuracy(
        metric="map",
        value=value,
        reference=reference,
        drop=reference - value,
        ci95=interval,
        samples=len(truth.boxes),
        labelled=True,
    )


def _by_image(outputs: Outputs) -> list[Array]:
    found = np.zeros((0, 7)) if outputs.detections is None else np.asarray(outputs.detections)
    return [found[found[:, 0] == index, 1:] for index in range(len(outputs))]


def _same_boxes(outputs: Outputs, native: Outputs) -> Accuracy:
    """Return the share of both models' detections that the other has too, with its bootstrap interval over images."""
    pairs = [detection.matched(mine, theirs) for mine, theirs in zip(_by_image(outputs), _by_image(native))]
    counts = np.array([[2 * same, both] for same, both in pairs], dtype=np.float64)

    def share(sums: Array) -> Array:
        return np.where(sums[:, 1] > 0, sums[:, 0] / np.maximum(sums[:, 1], 1), 1.0)

    value = float(share(counts.sum(axis=0)[None])[0])
    return _agreement("agreement", value, bootstrap_interval(counts, share), len(outputs))


def _agreement(metric: str, value: float, interval: tuple[float, float], samples: int) -> Accuracy:
    return Accuracy(
        metric=metric, value=value, reference=1.0, drop=1.0 - value, ci95=interval, samples=samples, labelled=False
    )


def _same_pixels(mine: Array, native: Array) -> Array:
    """Return for each image the share of the native map's pixels that the other map gives the same class."""
    same = np.empty(len(native))
    for index in range(len(native)):
        same[index] = float(
            np.mean(_on_grid(mine[index : index + 1], native[index : index + 1].shape)[0] == native[index])
        )
    return same


def collapse(
    outputs: Outputs,
    reference: Outputs | None,
    limits: Limits,
    *,
    task: str = "classification",
    found: Parity | None = None,
) -> tuple[str, ...]:
    """Return why these outputs are useless, in words; empty when they are not. `found` is their parity if it is known.

    Seen: NaN or infinity, the same output for different images, one class for nearly everything where the reference
    has many, embeddings that no longer tell images apart, and cosine or SQNR against the reference under the limits.
    """
    if broken := _broken_images(outputs):
        return (f"NaN or infinity in the outputs of {broken} of {len(outputs)} images",)
    reasons = [*_constant(outputs, reference)]
    if reference is not None:
        reasons += _alike(outputs, reference) if task == "embedding" else _one_class(outputs, reference)
        found = found or parity(outputs, reference)
        if found.cosine < limits.min_cosine:
            reasons.append(f"cosine with FP32 is {found.cosine:.3f}, under the limit of {limits.min_cosine:g}")
        if found.sqnr_db < limits.min_sqnr_db:
            reasons.append(f"SQNR against FP32 is {found.sqnr_db:.1f} dB, under the limit of {limits.min_sqnr_db:g} dB")
    return tuple(reasons)


def judge(
    outputs: Outputs,
    *,
    task: str = "classification",
    reference: Outputs | None = None,
    native: Outputs | None = None,
    labels: Sequence[int] | None = None,
    truth: Truth | None = None,
    limits: Limits | None = None,
    executed_by: str = "",
) -> Verification:
    """Return the verdict on one engine's outputs; what was not given is not judged.

    Args:
        outputs: of the engine, an array an output, (N, ...) each.
        task: what the outputs mean.
        reference: the same, of the variant in FP32; None when these outputs are that reference.
        native: the outputs of the native model at its own resolution, on the same images.
        labels: N classes; used for (N, C) outputs of a classifier.
        truth: the true boxes of a detector's images.
        limits: when parity counts as a collapse.
        executed_by: the runtime that made `outputs`.
    """
    comparable = reference is not None and not _broken_images(outputs)
    found = parity(outputs, reference, task=task) if reference is not None and comparable else None
    reasons = collapse(outputs, reference, limits or Limits(), task=task, found=found)
    return Verification(
        passed=not reasons,
        reasons=reasons,
        executed_by=executed_by,
        parity=found,
        accuracy=labelled_accuracy(outputs, task=task, native=native, labels=labels, truth=truth),
        agreement=None if native is None else agreement(outputs, native, task),
    )


def labelled_accuracy(
    outputs: Outputs,
    *,
    task: str,
    native: Outputs | None = None,
    labels: Sequence[int] | None = None,
    truth: Truth | None = None,
) -> Accuracy | None:
    """Return the task's own metric against the labels, masks or boxes; None where there are none."""
    if truth is not None:
        return detection_accuracy(outputs, native, truth)
    if outputs.counts is not None:
        return segmentation_accuracy(outputs.counts, None if native is None else native.counts)
    if labels is None or task != "classification" or outputs.arrays[0].ndim != 2:
        return None
    return accuracy(outputs.arrays[0], labels, None if native is None else native.arrays[0])


def decisions(logits: Array) -> Array:
    """Return the class of each image (N,); -1 where a logit is NaN. One column: its sign."""
    undecided = np.isnan(logits).any(axis=1)
    classes = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else np.argmax(logits, axis=1)
    return np.where(undecided, -1, classes)


def _pieces(array: Array) -> Iterator[slice]:
    row_bytes = max(1, array[:1].size * 8)
    rows = max(1, _PIECE_BYTES // row_bytes)
    return (slice(start, start + rows) for start in range(0, len(array), rows))


def _broken_images(outputs: Outputs) -> int:
    """Count the images whose output holds NaN or infinity."""
    finite = np.ones(len(outputs), dtype=bool)
    for array in outputs.arrays:
        for piece in _pieces(array):
            finite[piece] &= np.isfinite(array[piece]).reshape(len(array[piece]), -1).all(axis=1)
    return int((~finite).sum())


def _check_same_shape(outputs: Array, reference: Array) -> None:
    if outputs.shape != reference.shape:
        raise InvariantError(f"the engine's outputs have shape {outputs.shape}, the FP32 variant's {reference.shape}")
    if not len(outputs):
        raise InvariantError("there are no outputs to verify; give at least one image")


def _cosine(dot: float, first: float, second: float) -> float:
    if first == 0.0 and second == 0.0:
        return 1.0
    product = math.sqrt(first) * math.sqrt(second)
    return dot / product if product > 0.0 else 0.0


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return SQNR_LIMIT_DB
    if signal == 0.0:
        return -SQNR_LIMIT_DB
    return min(SQNR_LIMIT_DB, max(-SQNR_LIMIT_DB, 10.0 * math.log10(signal / noise)))


def _answers(outputs: Outputs) -> Array | None:
    """Return the classes of all images or of all their pixels; None where the outputs are no class scores."""
    if outputs.decisions is not None:
        return outputs.decisions
    first = outputs.arrays[0]
    return decisions(first) if first.ndim == 2 and len(outputs.arrays) == 1 else None


def _top1_agreement(outputs: Outputs, reference: Outputs, task: str) -> float | None:
    if task not in ("classification", "segmentation"):
        return None
    mine, exact = _answers(outputs), _answers(reference)
    if mine is None or exact is None:
        return None
    return float(
        np.mean([np.mean(mine[piece] == exact[piece]) for piece in (slice(i, i + 1) for i in range(len(mine)))])
    )


def _on_grid(classes: Array, shape: tuple[int, ...]) -> Array:
    """Sample (N, h, w) class maps at the nearest pixels of another grid; (N,) and equal sizes pass through."""
    if classes.ndim != 3 or classes.shape == shape:
        return classes
    rows = (np.arange(shape[1]) * 2 + 1) * classes.shape[1] // (2 * shape[1])
    columns = (np.arange(shape[2]) * 2 + 1) * classes.shape[2] // (2 * shape[2])
    return classes[:, rows[:, None], columns[None, :]]


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


def _constant(outputs: Outputs, reference: Outputs | None) -> tuple[str, ...]:
    if len(outputs) < 2:
        return ()
    exact = (None,) * len(outputs.arrays) if reference is None else reference.arrays
    if all(_is_constant(mine, other) for mine, other in zip(outputs.arrays, exact)):
        return (f"the output is the same for all {len(outputs)} images",)
    return ()


def _is_constant(outputs: Array, reference: Array | None) -> bool:
    spread, size = _spread(outputs)
    expected = _spread(reference)[0] if reference is not None else size
    return expected > 0.0 and spread <= (1e-3 if reference is not None else 1e-6) * expected


def _spread(outputs: Array) -> tuple[float, float]:
    """Return the mean over the elements of (largest - smallest over the images), and the mean absolute value."""
    low = high = outputs[0].astype(np.float64)
    total = 0.0
    for piece in _pieces(outputs):
        low = np.minimum(low, outputs[piece].min(axis=0))
        high = np.maximum(high, outputs[piece].max(axis=0))
        total += float(np.abs(outputs[piece]).sum(dtype=np.float64))
    return float(np.mean(high - low)), total / max(1, outputs.size)


def _alike(outputs: Outputs, reference: Outputs) -> tuple[str, ...]:
    mine, exact = (embedding.likeness(one.arrays[0]) for one in (outputs, reference))
    if mine < _ALIKE or exact > _UNLIKE:
        return ()
    return (f"the embeddings of different images are alike: mean cosine {mine:.3f}, in FP32 it is {exact:.3f}",)


def _one_class(outputs: Outputs, reference: Outputs) -> tuple[str, ...]:
    mine, exact = _answers(outputs), _answers(reference)
    if mine is None or exact is None or len(outputs) < _FEW_IMAGES:
        return ()
    (name, share), (_, usual) = _top_class(mine), _top_class(exact)
    if share < _ONE_CLASS or usual > _MANY_CLASSES:
        return ()
    return (f"{share:.0%} of the decisions are class {name}; in FP32 the most frequent class has {usual:.0%}",)


def _top_class(answers: Array) -> tuple[int, float]:
    values, counts = np.unique(answers, return_counts=True)
    return int(values[counts.argmax()]), float(counts.max() / counts.sum())
