"""What outputs say: the class of each image or pixel, the boxes of an image. Arrays are read in pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.metrics.outputs import Outputs

Array = NDArray[Any]

_PIECE_BYTES = 8 << 20


def decisions(logits: Array) -> Array:
    """Return the class of each image (N,); -1 where a logit is NaN. One column: its sign."""
    undecided = np.isnan(logits).any(axis=1)
    found = (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else np.argmax(logits, axis=1)
    return np.where(undecided, -1, found)


def classes(outputs: Outputs) -> Array | None:
    """Return the classes of all images or of all their pixels; None where the outputs are no class scores."""
    if outputs.decisions is not None:
        return outputs.decisions
    first = outputs.arrays[0]
    return decisions(first) if first.ndim == 2 and len(outputs.arrays) == 1 else None


def boxes_by_image(outputs: Outputs) -> list[Array]:
    found = np.zeros((0, 7)) if outputs.detections is None else np.asarray(outputs.detections)
    return [found[found[:, 0] == index, 1:] for index in range(len(outputs))]


def pieces(array: Array) -> Iterator[slice]:
    row_bytes = max(1, array[:1].size * 8)
    rows = max(1, _PIECE_BYTES // row_bytes)
    return (slice(start, start + rows) for start in range(0, len(array), rows))


def broken_images(outputs: Outputs) -> int:
    """Count the images whose output holds NaN or infinity."""
    finite = np.ones(len(outputs), dtype=bool)
    for array in outputs.arrays:
        for piece in pieces(array):
            finite[piece] &= np.isfinite(array[piece]).reshape(len(array[piece]), -1).all(axis=1)
    return int((~finite).sum())
