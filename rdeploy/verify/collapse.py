"""Find outputs that are useless: broken, constant, one class for everything, embeddings that are all alike, far from FP32."""

from __future__ import annotations

import numpy as np

from rdeploy.metrics import embedding
from rdeploy.metrics.outputs import Outputs
from rdeploy.results import Parity
from rdeploy.types import Limits
from rdeploy.verify import parity
from rdeploy.verify.answers import Array, broken_images, classes, pieces

_ONE_CLASS = 0.95
_MANY_CLASSES = 0.75
_FEW_IMAGES = 8
_ALIKE, _UNLIKE = 0.99, 0.9
_TELLING = 0.01
"""A reference whose outputs differ by less than this share of their size tells the images apart by its rounding only."""


def reasons(
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
    if broken := broken_images(outputs):
        return (f"NaN or infinity in the outputs of {broken} of {len(outputs)} images",)
    seen = [*_constant(outputs, reference)]
    if reference is not None:
        seen += _alike(outputs, reference) if task == "embedding" else _one_class(outputs, reference)
        found = found or parity.compare(outputs, reference)
        if found.cosine < limits.min_cosine:
            seen.append(f"cosine with FP32 is {found.cosine:.3f}, under the limit of {limits.min_cosine:g}")
        if found.sqnr_db < limits.min_sqnr_db:
            seen.append(f"SQNR against FP32 is {found.sqnr_db:.1f} dB, under the limit of {limits.min_sqnr_db:g} dB")
    return tuple(seen)


def _constant(outputs: Outputs, reference: Outputs | None) -> tuple[str, ...]:
    if len(outputs) < 2:
        return ()
    exact = (None,) * len(outputs.arrays) if reference is None else reference.arrays
    if all(_is_constant(mine, other) for mine, other in zip(outputs.arrays, exact)):
        return (f"the output is the same for all {len(outputs)} images",)
    return ()


def _is_constant(outputs: Array, reference: Array | None) -> bool:
    spread, size = _spread(outputs)
    if reference is None:
        return size > 0.0 and spread <= 1e-6 * size
    expected, size = _spread(reference)
    return expected > _TELLING * size and spread <= 1e-3 * expected


def _spread(outputs: Array) -> tuple[float, float]:
    """Return the mean over the elements of (largest - smallest over the images), and the mean absolute value."""
    low = high = outputs[0].astype(np.float64)
    total = 0.0
    for piece in pieces(outputs):
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
    mine, exact = classes(outputs), classes(reference)
    if mine is None or exact is None or len(outputs) < _FEW_IMAGES:
        return ()
    (name, share), (_, usual) = _top_class(mine), _top_class(exact)
    if share < _ONE_CLASS or usual > _MANY_CLASSES:
        return ()
    return (f"{share:.0%} of the decisions are class {name}; in FP32 the most frequent class has {usual:.0%}",)


def _top_class(answers: Array) -> tuple[int, float]:
    values, counts = np.unique(answers, return_counts=True)
    return int(values[counts.argmax()]), float(counts.max() / counts.sum())
