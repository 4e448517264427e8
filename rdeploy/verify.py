"""Judge an engine by its outputs: against its variant in FP32 (parity), the labels, and the native model's decisions.

Outputs are arrays (or memory maps) with one row per image, read in pieces: they need not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import ConfigError, InvariantError
from rdeploy.types import Accuracy, Limits, Parity, Verification

Array = NDArray[Any]

SQNR_LIMIT_DB = 200.0
"""Identical outputs have no noise; beyond float32's own precision the ratio says nothing, so it ends here."""
_PIECE_BYTES = 8 << 20
_Z95 = 1.959963984540054
_ONE_CLASS = 0.95
_MANY_CLASSES = 0.75
_FEW_IMAGES = 8


def parity(outputs: Array, reference: Array) -> Parity:
    """Compare an engine's outputs with those of the same variant in FP32, both (N, ...), over everything at once.

    `sqnr_db` is 10 log10(sum ref^2 / sum (ref - out)^2), within +-200; `top1_agreement` is per image for (N, C), per
    pixel for (N, C, H, W), None for other shapes.

    Raises:
        InvariantError: the shapes differ, or the outputs hold NaN or infinity (`collapse` says so in words).
    """
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
        top1_agreement=_top1_agreement(outputs, reference),
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


def agreement(logits: Array, reference_logits: Array) -> Accuracy:
    """Return how often the variant decides as the native model does: per image for (N, C), per pixel for (N, C, H, W).

    Dense outputs of another size are compared on the native grid (nearest). `ci95` is the Wilson interval of `value`
    with one count an image, since the pixels of one image are not independent.

    Raises:
        InvariantError: the two do not hold the same number of images and classes.
    """
    if logits.shape[:2] != reference_logits.shape[:2] or logits.ndim != reference_logits.ndim:
        raise InvariantError(
            f"the variant's outputs {logits.shape} do not fit the native model's {reference_logits.shape}"
        )
    total = 0.0
    for piece in _pieces(reference_logits):
        mine, native = decisions(logits[piece]), decisions(reference_logits[piece])
        total += float(np.mean(_on_grid(mine, native.shape) == native)) * len(native)
    value = total / max(1, len(logits))
    return Accuracy(
        metric="agreement",
        value=value,
        reference=1.0,
        drop=1.0 - value,
        ci95=wilson_interval(value, len(logits)),
        samples=len(logits),
        labelled=False,
    )


def collapse(
    outputs: Array, reference: Array | None, limits: Limits, *, found: Parity | None = None
) -> tuple[str, ...]:
    """Return why these outputs are useless, in words; empty when they are not. `found` is their parity if it is known.

    Seen: NaN or infinity, the same output for different images, one class for nearly everything where the reference
    has many, and cosine or SQNR against the reference under the limits.
    """
    if broken := _broken_images(outputs):
        return (f"NaN or infinity in the outputs of {broken} of {len(outputs)} images",)
    reasons = [*_constant(outputs, reference)]
    if reference is not None:
        reasons += _one_class(outputs, reference)
        found = found or parity(outputs, reference)
        if found.cosine < limits.min_cosine:
            reasons.append(f"cosine with FP32 is {found.cosine:.3f}, under the limit of {limits.min_cosine:g}")
        if found.sqnr_db < limits.min_sqnr_db:
            reasons.append(f"SQNR against FP32 is {found.sqnr_db:.1f} dB, under the limit of {limits.min_sqnr_db:g} dB")
    return tuple(reasons)


def judge(
    outputs: Array,
    *,
    reference: Array | None = None,
    native: Array | None = None,
    labels: Sequence[int] | None = None,
    limits: Limits | None = None,
    executed_by: str = "",
) -> Verification:
    """Return the verdict on one engine's outputs; what was not given is not judged.

    Args:
        outputs: (N, ...) of the engine.
        reference: the same, of the variant in FP32; None when these outputs are that reference.
        native: (N, C, ...) of the native model at its own resolution, on the same images.
        labels: N classes; used for (N, C) outputs.
        limits: when parity counts as a collapse.
        executed_by: the runtime that made `outputs`.
    """
    comparable = reference is not None and not _broken_images(outputs)
    found = parity(outputs, reference) if reference is not None and comparable else None
    reasons = collapse(outputs, reference, limits or Limits(), found=found)
    return Verification(
        passed=not reasons,
        reasons=reasons,
        executed_by=executed_by,
        parity=found,
        accuracy=accuracy(outputs, labels, native) if labels is not None and outputs.ndim == 2 else None,
        agreement=agreement(outputs, native) if native is not None and _has_decisions(outputs) else None,
    )


def decisions(logits: Array) -> Array:
    """Return the class of each image (N,) or pixel (N, H, W); -1 where a logit is NaN. One column: its sign."""
    undecided = np.isnan(logits).any(axis=1)
    classes = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else np.argmax(logits, axis=1)
    return np.where(undecided, -1, classes)


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """Return the Wilson score interval (95 %) of a proportion: honest for few samples and at 0 and 1 (Wilson 1927)."""
    if samples == 0:
        return 0.0, 1.0
    spread = _Z95**2 / samples
    middle = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, middle - half), min(1.0, middle + half)


def _pieces(array: Array) -> Iterator[slice]:
    row_bytes = max(1, array[:1].size * 8)
    rows = max(1, _PIECE_BYTES // row_bytes)
    return (slice(start, start + rows) for start in range(0, len(array), rows))


def _broken_images(outputs: Array) -> int:
    """Count the images whose output holds NaN or infinity."""
    finite = (np.isfinite(outputs[p]).reshape(len(outputs[p]), -1).all(axis=1) for p in _pieces(outputs))
    return sum(int((~rows).sum()) for rows in finite)


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


def _has_decisions(outputs: Array) -> bool:
    return outputs.ndim in (2, 4)


def _top1_agreement(outputs: Array, reference: Array) -> float | None:
    if not _has_decisions(outputs):
        return None
    same = 0.0
    for piece in _pieces(outputs):
        equal = decisions(outputs[piece]) == decisions(reference[piece])
        same += float(equal.mean()) * len(equal)
    return same / len(outputs)


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


def _constant(outputs: Array, reference: Array | None) -> tuple[str, ...]:
    if len(outputs) < 2:
        return ()
    spread, size = _spread(outputs)
    expected = _spread(reference)[0] if reference is not None else size
    if expected > 0.0 and spread <= (1e-3 if reference is not None else 1e-6) * expected:
        return (f"the output is the same for all {len(outputs)} images",)
    return ()


def _spread(outputs: Array) -> tuple[float, float]:
    """Return the mean over the elements of (largest - smallest over the images), and the mean absolute value."""
    low = high = outputs[0].astype(np.float64)
    total = 0.0
    for piece in _pieces(outputs):
        low = np.minimum(low, outputs[piece].min(axis=0))
        high = np.maximum(high, outputs[piece].max(axis=0))
        total += float(np.abs(outputs[piece]).sum(dtype=np.float64))
    return float(np.mean(high - low)), total / max(1, outputs.size)


def _one_class(outputs: Array, reference: Array) -> tuple[str, ...]:
    if not _has_decisions(outputs) or len(outputs) < _FEW_IMAGES:
        return ()
    (name, share), (_, usual) = _top_class(outputs), _top_class(reference)
    if share < _ONE_CLASS or usual > _MANY_CLASSES:
        return ()
    return (f"{share:.0%} of the decisions are class {name}; in FP32 the most frequent class has {usual:.0%}",)


def _top_class(outputs: Array) -> tuple[int, float]:
    counts = np.zeros(max(2, outputs.shape[1]), dtype=np.int64)
    for piece in _pieces(outputs):
        counts += np.bincount(decisions(outputs[piece]).ravel(), minlength=len(counts))
    return int(counts.argmax()), float(counts.max() / counts.sum())
