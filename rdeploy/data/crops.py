"""Random parts of training images, as two networks see them: rows of images go in, two arrays of pixels come out.

The parts are adjusted to the test crop (Touvron et al. 2019): their size is drawn around what the network will see of an image
when it is deployed, so that objects appear as large in training as later on. What is drawn for an image depends on the seed,
the epoch and the image alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
"""A part's side is between 1/ZOOM and ZOOM times that of the test crop, as far as the image reaches."""
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
        (top, left, bottom, right), flipped = self._drawn(epoch, row, (mask.shape[0], mask.shape[1]))
        height, width = self.native
        down = (top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(np.int64)
        across = (left + (np.arange(width) + 0.5) * (right - left) / width).astype(np.int64)
        part = mask[down[:, None], across[None, :]]
        part = np.where(np.isin(part, self.void), IGNORED, part)
        return part[:, ::-1] if flipped else part

    def _drawn(self, epoch: int, row: int, size: Size) -> tuple[Box, bool]:
        """Return the part of an image of `size`, in its own pixels, and whether it is flipped."""
        rng = np.random.default_rng([self.seed, 7, epoch, row])
        box = random_box(size, preprocess.view(size, self.resolution, self.preprocessing), rng)
        return box, self.flips and rng.random() < 0.5

    def _part(self, epoch: int, row: int) -> tuple[Pixels, Pixels]:
        image = self.images.read(row)
        box, flipped = self._drawn(epoch, row, preprocess.size_of(image))
        large = preprocess.cut(image, box, self.native, self.native_preprocessing, channels=self.channels)
        small = large
        if self.resolution != self.native:
            small = preprocess.cut(image, box, self.resolution, self.preprocessing, channels=self.channels)
        if flipped:
            large, small = (np.ascontiguousarray(one[:, ::-1]) for one in (large, small))
        return large, small


def random_box(size: Size, test: Box, rng: np.random.Generator) -> Box:
    """Return a part (top, left, bottom, right) of an image of `size` (h, w), around as large as `test` and anywhere in it.

    Side and aspect are log-uniform; what would be larger than the image is cut down to it.
    """
    height, width = test[2] - test[0], test[3] - test[1]
    room = min(ZOOM, max(1.0, min(size[0] / height, size[1] / width)))
    side = math.exp(rng.uniform(-math.log(ZOOM), math.log(room)))
    aspect = math.exp(rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)) / 2)
    height, width = min(size[0], height * side * aspect), min(size[1], width * side / aspect)
    top, left = rng.uniform(0, size[0] - height), rng.uniform(0, size[1] - width)
    return top, left, top + height, left + width
