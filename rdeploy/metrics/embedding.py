"""Embeddings: how close the vectors of a variant are to the native model's, and whether they still tell images apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import spread

Array = NDArray[Any]

_MOST_COMPARED = 512


def cosines(first: Array, second: Array) -> Array:
    """Return the cosine similarity of each pair of rows, float64 (N,); 0 where a vector is zero or not finite."""
    a, b = _rows(first), _rows(second)
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.einsum("nd,nd->n", a, b) / product
    return np.where(np.isfinite(found), found, 0.0)


def likeness(vectors: Array) -> float:
    """Return the mean cosine similarity of different images: 1 when the embedding has collapsed to one direction.

    At most 512 images, evenly spaced, are compared.
    """
    chosen = spread.evenly(len(vectors), _MOST_COMPARED)
    rows = _rows(vectors[chosen])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    count = len(rows)
    if count < 2:
        return 0.0
    total = float(np.square(np.linalg.norm(rows.sum(axis=0))))
    return (total - float(np.square(rows).sum())) / (count * (count - 1))


def _rows(vectors: Array) -> Array:
    return np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)
