"""Where calibration images come from, and how they are handed to the graph: one by one, normalised when asked for."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.data import pairs, preprocess
from rdeploy.data.images import ImageSet, collect
from rdeploy.errors import ConfigError
from rdeploy.store import Store
from rdeploy.types import ModelSpec

RANDOM = "random"


def is_path(calib: str) -> bool:
    """Whether --calib names a file or folder, not a function or random data."""
    return calib != RANDOM and (":" not in calib or Path(calib).exists())


class NormalisedImages(Sequence[NDArray[np.float32]]):
    """Calibration images as the network takes them, (1, C, H, W) each, normalised when asked for."""

    def __init__(self, pixels: Path, spec: ModelSpec) -> None:
        self._pixels = np.load(pixels, mmap_mode="r", allow_pickle=False)
        self._preprocessing = spec.preprocessing

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return preprocess.normalise(np.asarray(self._pixels[index])[None], self._preprocessing)


def collect_calibration(calib: str, *, limit: int, seed: int, store: Store, spec: ModelSpec) -> ImageSet:
    """Return the calibration images: a folder, CSV or array file, a function's images, or random ones if so asked.

    Raises:
        ConfigError: there are none, or the function cannot be called.
    """
    if calib == RANDOM:
        return _array_set(_random_pixels(min(limit, 64), spec, seed), store)
    if not is_path(calib):
        return _from_function(calib, limit=limit, store=store, spec=spec)
    return collect(pairs.images_below(calib), limit=limit, seed=seed)


def stand_in_images(spec: ModelSpec, *, seed: int, store: Store) -> ImageSet:
    """Return smooth random pictures to compare graphs on where the user gave no images at all."""
    return _array_set(_random_pixels(16, spec, seed), store)


def _random_pixels(count: int, spec: ModelSpec, seed: int) -> NDArray[np.uint8]:
    """Coarse noise enlarged: like a photograph it has large areas, unlike one it means nothing."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 8, 8, spec.channels), dtype=np.uint8)
    height, width = (-(-side // 8) for side in spec.native_resolution)
    return coarse.repeat(height, axis=1).repeat(width, axis=2)


def _array_set(array: NDArray[np.uint8], store: Store) -> ImageSet:
    key = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
    folder = store.make("random", key, lambda folder: np.save(folder / "images.npy", array))
    return collect(folder / "images.npy")


def _from_function(name: str, *, limit: int, store: Store, spec: ModelSpec) -> ImageSet:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        given = list(itertools.islice(getattr(importlib.import_module(module), function)(), limit))
    except Exception as error:
        raise ConfigError(f"--calib {name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not given:
        raise ConfigError(f"--calib {name}: the function gave no images")
    # What every image is resized to before it is cropped: the crop itself follows where the images are used.
    whole = replace(spec.preprocessing, crop_pct=1.0)
    height, width = (math.floor(side / spec.preprocessing.crop_pct) for side in spec.native_resolution)
    pixels = [preprocess.to_pixels(image, (height, width), whole, channels=spec.channels) for image in given]
    return _array_set(np.stack(pixels), store)
