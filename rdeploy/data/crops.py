"""Random parts of training images, as two networks see them: rows of images go in, two arrays of pixels come out.

The parts are adjusted to the test crop (Touvron et al. 2019): half of them have its size and are moved by whole pixels, so that
they are as sharp as what the network will see when it is deployed; the others are drawn around its size, larger as often as
smaller, so that objects appear as large in training as later on. What reaches beyond the image is reflected at its edge. What
is drawn for an image depends on the seed, the epoch and the image alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.data import pairs, preprocess
from rdeploy.data.images import ImageSet
from rdeploy.types import Preprocessing, Size

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]

IGNORED = -100
"""What is no class, as PyTorch's cross entropy has it."""
ZOOM = 1.25
"""A part's side is between 1/ZOOM and ZOOM times that of the test crop."""
BEYOND = 1 / 8
"""By so much of the test crop's side a part is moved at most where the image has no room for it."""
_ASPECT = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomParts:
    """Training images for a teacher at `native` and a student at `resolution`, each with its own preprocessing.

    `void` are values of masks that are no class.
    """

    images: ImageSet
    labels: tuple[int, ...] | None
    channels: int
    native: Size
    native_preprocessing: Preprocessing
    resolution: Size
    preprocessing: Preprocessing
    seed: int = 0
    flips: bool = True
    void: tuple[int, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether the truth about the images is known."""
        return self.labels is not None or self.images.masks is not None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, epoch: int, rows: Sequence[int]) -> tuple[Pixels, Pixels]:
        """Return the same parts of some images at the native and at the variant's resolution, uint8 (N, h, w, C)."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(lambda row: self._part(epoch, row), rows))
        return np.stack([large for large, _ in found]), np.stack([small for _, small in found])

    def truth(self, epoch: int, rows: Sequence[int]) -> NDArray[np.int64] | None:
        """Return the class of each image (N,), or of each pixel of the same parts (N, h, w) at the native resolution.

        What is void is `IGNORED`. None where nothing is known.
        """
        if self.images.masks is not None:
            return np.stack([self._mask(epoch, row) for row in rows])
        return None if self.labels is None else np.array([self.labels[row] for row in rows], np.int64)

    def _mask(self, epoch: int, row: int) -> NDArray[np.int64]:
        assert self.images.masks is not None
        mask = pairs.read_mask(self.images.masks[row])
        box, flipped = self._drawn(epoch, row, (mask.shape[0], mask.shape[1]))
        mask, (top, left, bottom, right) = _reflected(mask, box)
        height, width = self.native
        down = (top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(np.int64)
        across = (left + (np.arange(width) + 0.5) * (right - left) / width).astype(np.int64)
        part = mask[down[:, None], across[None, :]]
        part = np.where(np.isin(part, self.void), IGNORED, part)
        return part[:, ::-1] if flipped else part

    def _drawn(self, epoch: int, row: int, size: Size) -> tuple[Box, bool]:
        """Return the part of an image of `size`, in its own pixels, and whether it is flipped."""
        rng = np.random.default_rng([self.seed, 7, epoch, row])
        box = random_box(size, preprocess.view(size, self.resolution, self.preprocessing), self.native, rng)
        return box, self.flips and rng.random() < 0.5

    def _part(self, epoch: int, row: int) -> tuple[Pixels, Pixels]:
        image = self.images.read(row)
        box, flipped = self._drawn(epoch, row, preprocess.size_of(image))
        image, box = _reflected(image, box)
        large = preprocess.cut(image, box, self.native, self.native_preprocessing, channels=self.channels)
        small = large
        if self.resolution != self.native:
            small = preprocess.cut(image, box, self.resolution, self.preprocessing, channels=self.channels)
        if flipped:
            large, small = (np.ascontiguousarray(one[:, ::-1]) for one in (large, small))
        return large, small


def random_box(size: Size, test: Box, pixels: Size, rng: np.random.Generator) -> Box:
    """Return a part (top, left, bottom, right) of an image of `size` (h, w), around as large as `test` and anywhere in it.

    Half of the parts have the size of `test` and are moved by whole ones of the `pixels` (h, w) that it is seen with; the side
    and the aspect of the others are log-uniform. Where there is no room the part reaches beyond the image.
    """
    tested = test[2] - test[0], test[3] - test[1]
    as_tested = rng.random() < 0.5
    side = aspect = 1.0
    if not as_tested:
        side = math.exp(rng.uniform(-math.log(ZOOM), math.log(ZOOM)))
        aspect = math.exp(rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)) / 2)
    parts = tested[0] * side * aspect, tested[1] * side / aspect
    starts = [_start(whole, part, crop, rng) for whole, part, crop in zip(size, parts, tested)]
    if as_tested:
        steps = [crop / count for crop, count in zip(tested, pixels)]
        starts = [first + round((start - first) / step) * step for start, first, step in zip(starts, test, steps)]
    return starts[0], starts[1], starts[0] + parts[0], starts[1] + parts[1]


def _start(whole: float, part: float, tested: float, rng: np.random.Generator) -> float:
    """Return where a part of a side begins: anywhere that it fits, and a little off its middle at least."""
    low, high = sorted((0.0, whole - part))
    middle, room = (whole - part) / 2, BEYOND * tested
    return float(rng.uniform(min(low, middle - room), max(high, middle + room)))


def _reflected(image: Any, box: Box) -> tuple[Any, Box]:
    """Return the image with as much reflected at its edges as the box reaches beyond it, and the box in that one's pixels."""
    height, width = preprocess.size_of(image)
    top, left, bottom, right = (max(0, math.ceil(side)) for side in (-box[0], -box[1], box[2] - height, box[3] - width))
    if not (top or left or bottom or right):
        return image, box
    array = np.asarray(image)
    array = np.pad(array, ((top, bottom), (left, right), *[(0, 0)] * (array.ndim - 2)), "reflect")
    return array, (box[0] + top, box[1] + left, box[2] + top, box[3] + left)
