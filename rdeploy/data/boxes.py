"""A folder of images and YOLO label files goes in, an `ImageSet` with a label file for each image comes out."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rdeploy.data.images import ImageSet, collect
from rdeploy.errors import ConfigError
from rdeploy.serde import file_sha256

_WANTED = (
    "give a folder with images/ and labels/ in it, where labels/NAME.txt has a line `class cx cy width height` (relative "
    "to the image) for each box of images/NAME"
)


def collect_boxed(path: str, *, limit: int | None = None, seed: int = 0) -> ImageSet:
    """Return the images below PATH/images that have a label file of the same relative name below PATH/labels.

    Raises:
        ConfigError: the folders are not there, no image has a label file, or the first one is damaged.
    """
    images, labels = Path(path) / "images", Path(path) / "labels"
    if not images.is_dir() or not labels.is_dir():
        raise ConfigError(f"{path} holds no images with boxes: {_WANTED}")
    found = collect(images)
    places = [labels / Path(file).relative_to(images).with_suffix(".txt") for file in found.paths]
    chosen = [index for index, place in enumerate(places) if place.is_file()]
    if not chosen:
        raise ConfigError(f"none of the {len(found)} images of {images} has a label file in {labels}: {_WANTED}")
    if limit is not None and limit < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    paths = tuple(found.paths[index] for index in chosen)
    files = tuple(str(places[index]) for index in chosen)
    for file in files:
        read_boxes(file)
    digest = hashlib.sha256("\n".join(file_sha256(file) for pair in zip(paths, files) for file in pair).encode())
    return replace(found, paths=paths, labels=None, boxes=files, sha256=digest.hexdigest())


def read_boxes(path: str) -> NDArray[np.float64]:
    """Return the boxes of a label file, (K, 5): left, top, right, bottom relative to the image, and the class.

    Raises:
        ConfigError: a line is not five numbers.
    """
    try:
        rows = [[float(word) for word in line.split()] for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the label file {path} could not be read: {' '.join(str(error).split())}") from error
    if any(len(row) != 5 for row in rows):
        raise ConfigError(f"the label file {path} has a line that is not five numbers: {_WANTED}")
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    half = table[:, 3:5] / 2
    return np.column_stack([table[:, 1:3] - half, table[:, 1:3] + half, table[:, 0]])
