"""The outputs of one run go in piece by piece; what verification needs of them is kept, in memory or in files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import InvariantError, Unsupported
from rdeploy.metrics import detection, segmentation
from rdeploy.metrics.outputs import Outputs
from rdeploy.worker.jobs import VerifyRequest

Array = NDArray[Any]

DENSE_BYTES = 256 << 20
"""Scores of every pixel of every image can fill a disk: of more than this, parity sees every k-th row and column."""


class Recorder:
    """Keeps a row an image: float32 outputs, and for segmentation the decisions and the counts against the masks.

    With `path` the rows go to files as they come, which appear under their names when they are complete.
    """

    def __init__(self, images: int, resolution: tuple[int, int], request: VerifyRequest, path: Path | None) -> None:
        self._images, self._resolution, self._request, self._path = images, resolution, request, path
        self._arrays: list[Array] = []
        self._steps: list[int] = []
        self._decisions: Array | None = None
        self._counts: Array | None = None
        self._detections: list[Array] = []
        self.names: tuple[str, ...] = ()
        """The outputs' names, where a detector's form depends on them."""

    def add(self, start: int, rows: Sequence[Array]) -> None:
        """Keep the rows of the images from `start` on, one array an output."""
        if not self._arrays:
            self._allocate(rows)
        for kept, step, values in zip(self._arrays, self._steps, rows):
            kept[start : start + len(values)] = values[:, :, ::step, ::step] if step > 1 else values
        if self._request.task == "detection":
            self._detect(start, rows)
        if self._decisions is not None:
            self._decisions[start : start + len(rows[0])] = segmentation.classes_of(rows[0])
        if self._counts is not None:
            for offset, scores in enumerate(rows[0]):
                self._counts[start + offset] = self._count(start + offset, scores)

    def finish(self) -> Outputs:
        """Return what was kept, after its files have got their names."""
        if not self._arrays:
            raise InvariantError("there are no images to run")
        named = [(str(index) if index else "", array) for index, array in enumerate(self._arrays)]
        for name, array in (*named, ("decisions", self._decisions), ("counts", self._counts)):
            if isinstance(array, np.memmap):
                array.flush()
                self._partial(name).replace(self._file(name))
        found = np.concatenate(self._detections) if self._detections else None
        if found is not None and self._path is not None:
            np.save(self._file("detections"), found)
        return Outputs(arrays=tuple(self._arrays), decisions=self._decisions, counts=self._counts, detections=found)

    def _detect(self, start: int, rows: Sequence[Array]) -> None:
        for offset, boxes in enumerate(detection.decode(rows, self.names, self._request.frame or self._resolution)):
            self._detections.append(np.column_stack([np.full(len(boxes), start + offset, np.float32), boxes]))

    def _allocate(self, rows: Sequence[Array]) -> None:
        for index, values in enumerate(rows):
            step = _step(values, self._images)
            sample = values[:, :, ::step, ::step] if step > 1 else values
            self._steps.append(step)
            self._arrays.append(self._empty(str(index) if index else "", sample.shape[1:], np.float32))
        first = rows[0]
        if self._request.task != "segmentation":
            return
        if first.ndim != 4:
            raise Unsupported(f"segmentation needs scores (N, classes, H, W), the output has shape {first.shape}")
        self._decisions = self._empty("decisions", (*first.shape[2:],), np.int16)
        if self._request.masks is not None:
            classes = segmentation.number_of_classes(first.shape[1])
            self._counts = self._empty("counts", (3, classes), np.int64)

    def _count(self, index: int, scores: Array) -> Array:
        from rdeploy.data import pairs

        request = self._request
        assert request.masks is not None  # there are counts only with masks
        return pairs.counts(scores, request.masks[index], self._resolution, request.preprocessing, request.void)

    def _empty(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        if self._path is None:
            return np.empty((self._images, *shape), dtype)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._partial(name)
        return np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(self._images, *shape))

    def _file(self, name: str) -> Path:
        assert self._path is not None  # only memory maps have files
        return self._path.with_suffix(f".{name}.npy") if name else self._path

    def _partial(self, name: str) -> Path:
        return self._file(name).with_suffix(".partial")


def _step(values: Array, images: int) -> int:
    if values.ndim != 4:
        return 1
    size_bytes = values[:1].size * 4 * images
    return math.ceil(math.sqrt(size_bytes / DENSE_BYTES)) if size_bytes > DENSE_BYTES else 1
