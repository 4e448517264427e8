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

from rdeploy.data import preprocess
from rdeploy.data.images import ImageSet
from rdeploy.types import Preprocessing, Size

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]

ZOOM = 1.25
"""A part's side is between 1/ZOOM and ZOOM times that of the test crop, as far as the image reaches."""
_ASPECT = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomParts:
    """Training images for a teacher at `native` and a student at `resolution`, each with its own preprocessing."""

    images: ImageSet
    labels: tuple[int, ...] | None
    channels: int
    native: Size
    native_preprocessing: Preprocessing
    resolution: Size
    preprocessing: Preprocessing
    seed: int = 0
    flips: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, epoch: int, rows: Sequence[int]) -> tuple[Pixels, Pixels]:
        """Return the same parts of some images at the native and at the variant's resolution, uint8 (N, h, w, C)."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(lambda row: self._part(epoch, row), rows))
        return np.stack([large for large, _ in found]), np.stack([small for _, small in found])

    def _part(self, epoch: int, row: int) -> tuple[Pixels, Pixels]:
        rng = np.random.default_rng([self.seed, 7, epoch, row])
        image = self.images.read(row)
        size = preprocess.size_of(image)
        box = random_box(size, preprocess.view(size, self.resolution, self.preprocessing), rng)
        large = preprocess.cut(image, box, self.native, self.native_preprocessing, channels=self.channels)
        small = large
        if self.resolution != self.native:
            small = preprocess.cut(image, box, self.resolution, self.preprocessing, channels=self.channels)
        if self.flips and rng.random() < 0.5:
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
