"""A folder of images and masks goes in, an `ImageSet` with a mask for each image comes out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.data import preprocess
from rdeploy.data.decode import SUFFIXES, UNREADABLE, open_image, reason_of
from rdeploy.data.images import ImageSet, collect
from rdeploy.errors import ConfigError
from rdeploy.metrics import segmentation
from rdeploy.serde import file_sha256
from rdeploy.types import Preprocessing, Size

MASK_FOLDERS = ("masks", "labels", "annotations", "mask", "label", "annotation", "gt")
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
_WANTED = (
    "give a folder with images/ and masks/ in it, where each image has a mask of the same name: a PNG whose pixels are "
    "class indices"
)


def collect_pairs(path: str, *, limit: int | None = None, seed: int = 0) -> ImageSet:
    """Return the images below PATH/images that have a mask of the same relative name (any suffix) below PATH/masks.

    Raises:
        ConfigError: the folders are not there, no image has a mask, or a mask is no image of class indices.
    """
    folders = _folders(Path(path))
    if folders is None:
        raise ConfigError(f"{path} holds no images with masks: {_WANTED}")
    images, masks = folders
    by_name = {file.relative_to(masks).with_suffix("").as_posix(): file for file in _files(masks)}
    found = collect(images)
    pairs = [
        (index, by_name[name])
        for index, file in enumerate(found.paths)
        if (name := Path(file).relative_to(images).with_suffix("").as_posix()) in by_name
    ]
    if not pairs:
        raise ConfigError(f"none of the {len(found)} images of {images} has a mask in {masks}: {_WANTED}")
    if limit is not None and limit < len(pairs):
        pairs = sorted(random.Random(seed).sample(pairs, limit))
    alone = [(file, "it has no mask") for file in found.paths if file not in {found.paths[i] for i, _ in pairs}]
    paths = tuple(found.paths[index] for index, _ in pairs)
    files = tuple(str(mask) for _, mask in pairs)
    read_mask(files[0])
    digest = hashlib.sha256("\n".join(file_sha256(file) for pair in zip(paths, files) for file in pair).encode())
    skipped = found.skipped if limit is not None else (*found.skipped, *alone)
    return replace(found, paths=paths, labels=None, masks=files, sha256=digest.hexdigest(), skipped=skipped)


def images_below(path: str) -> str:
    """Return the folder of the images where `path` holds images and masks apart, else `path` itself."""
    folders = _folders(Path(path))
    return path if folders is None else str(folders[0])


def counts(
    scores: NDArray[Any], mask: str, resolution: Size, preprocessing: Preprocessing, void: Sequence[int]
) -> NDArray[np.int64]:
    """Return how an image's scores (C, h, w) do against its mask, (3, classes) as `segmentation.count` has it.

    `resolution` and `preprocessing` say which part of the image the network saw.
    """
    truth = read_mask(mask)
    size = (truth.shape[0], truth.shape[1])
    found, seen = segmentation.on_mask(scores, size, preprocess.view(size, resolution, preprocessing))
    return np.asarray(segmentation.count(found, truth[seen], segmentation.number_of_classes(len(scores)), void))


def read_mask(path: str) -> NDArray[np.int64]:
    """Return the class index of each pixel, (H, W); a palette's colours are not looked at, only its indices.

    Raises:
        ConfigError: the file is damaged, or a colour picture instead of class indices.
    """
    try:
        image = open_image(Path(path))
    except UNREADABLE as error:
        raise ConfigError(f"the mask {path} could not be read: {reason_of(error)}") from error
    array = np.asarray(image if image.mode in ("L", "P", "I", "I;16", "I;16B", "1") else image.convert("RGB"))
    if array.ndim == 3:
        if not (array == array[:, :, :1]).all():
            raise ConfigError(f"the mask {path} is a colour picture ({image.mode}): {_WANTED}")
        array = array[:, :, 0]
    return array.astype(np.int64)


def _folders(path: Path) -> tuple[Path, Path] | None:
    images = next((path / name for name in IMAGE_FOLDERS if (path / name).is_dir()), None)
    masks = next((path / name for name in MASK_FOLDERS if (path / name).is_dir()), None)
    return None if images is None or masks is None else (images, masks)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
