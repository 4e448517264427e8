"""The only preprocessing there is: an image enters, the network's pixels (uint8) or its normalised input leave.

It is the evaluation transform of timm (`crop_mode="center"`) and torchvision, on Pillow, bit for bit: the shorter side
is resized with an antialiased filter to `floor(size / crop_pct)`, then the centre is cropped. Like both of them it
ignores the EXIF orientation: a network that was evaluated without it is deployed without it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import ConfigError
from rdeploy.plugins import did_you_mean
from rdeploy.types import INTERPOLATIONS, Preprocessing, Size

if TYPE_CHECKING:
    from PIL import Image

    from rdeploy.data.images import ImageSet


def check_interpolation(name: str) -> str:
    """Return the name as Pillow's filters are called here.

    Raises:
        ConfigError: there is no such filter.
    """
    if name.lower() not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise ConfigError(f"unknown interpolation {name!r}{did_you_mean(name, INTERPOLATIONS)}; there are: {known}")
    return name.lower()


def to_pixels(image: Any, resolution: Size, preprocessing: Preprocessing, *, channels: int = 3) -> NDArray[np.uint8]:
    """Resize and centre-crop one image to `resolution`.

    `image` is a Pillow image or an array (H, W) or (H, W, C): uint8, or float in 0..1. Returns uint8 (H, W, C).

    Raises:
        ConfigError: the array is no image, or has other channels than the model.
    """
    bands = to_bands(image, channels)
    resized = [_resize(band, resolution, preprocessing) for band in bands]
    cropped = [np.asarray(_centre_crop(band, resolution)) for band in resized]
    arrays = [array[:, :, None] if array.ndim == 2 else array for array in cropped]
    return np.ascontiguousarray(np.concatenate(arrays, axis=2) if len(arrays) > 1 else arrays[0])


def normalise(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn uint8 (N, H, W, C) into contiguous float32 (N, C, H, W): `(pixels / 255 - mean) / std`.

    The order of operations is PyTorch's, so the result is that of `ToTensor` and `Normalize` to the last bit.

    Raises:
        ConfigError: mean and std do not have one value a channel.
    """
    count, height, width, channels = pixels.shape
    if len(preprocessing.mean) != channels or len(preprocessing.std) != channels:
        raise ConfigError(
            f"images of {channels} channels, but mean has {len(preprocessing.mean)} values and std "
            f"{len(preprocessing.std)}: give one for each channel with --mean and --std"
        )
    result = np.empty((count, channels, height, width), dtype=np.float32)
    for index in range(count):
        for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std)):
            plane = result[index, channel]
            np.divide(pixels[index, :, :, channel], np.float32(255), out=plane)
            plane -= np.float32(mean)
            plane /= np.float32(std)
    return result


def prepare(
    images: ImageSet,
    resolution: Size,
    preprocessing: Preprocessing,
    *,
    channels: int = 3,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """Return the pixels of all images, uint8 (N, H, W, C), read by a pool of threads.

    `progress(done, total)` is called in this thread after each image.

    Raises:
        ConfigError: a file is no longer what it was when it was collected.
    """
    result = np.empty((len(images), *resolution, channels), dtype=np.uint8)

    def fill(index: int) -> None:
        result[index] = to_pixels(images.read(index), resolution, preprocessing, channels=channels)

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for done, _ in enumerate(pool.map(fill, range(len(images))), start=1):
            if progress is not None:
                progress(done, len(images))
    return result


def prepare_each(
    images: ImageSet, resolution: Size, preprocessings: Sequence[Preprocessing], *, channels: int = 3
) -> list[NDArray[np.uint8]]:
    """Return what `prepare` returns for each of several preprocessings, reading every image once.

    Raises:
        ConfigError: a file is no longer what it was when it was collected.
    """
    results = [np.empty((len(images), *resolution, channels), dtype=np.uint8) for _ in preprocessings]

    def fill(index: int) -> None:
        image = images.read(index)
        for result, preprocessing in zip(results, preprocessings):
            result[index] = to_pixels(image, resolution, preprocessing, channels=channels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(images))))
    return results


def shrink(pixels: NDArray[np.uint8], resolution: Size, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize pictures (N, H, W, C) as a graph with the preprocessing inside does: all of each, by the filter alone."""
    whole = (0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[2]))
    return np.stack([cut(one, whole, resolution, preprocessing, channels=pixels.shape[3]) for one in pixels])


def to_bands(image: Any, channels: int) -> list[Image.Image]:
    """Return the image as Pillow images that can be resized: one RGB or grey one, or one grey one a channel.

    Raises:
        ConfigError: the array is no image, or has other channels than the model.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return [_convert(image, channels)]
    array = _to_uint8(np.asarray(image))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2 or (array.shape[2] == 3 and channels in (1, 3)):
        return [_convert(Image.fromarray(array), channels)]
    if array.shape[2] != channels:
        raise ConfigError(
            f"an image of shape {array.shape}, but the model takes {channels} channels (H, W, {channels})"
        )
    return [Image.fromarray(np.ascontiguousarray(array[:, :, c])) for c in range(channels)]


def _to_uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ConfigError(f"an array of shape {array.shape} is no image: give (H, W, C) or (H, W)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"an image of {array.dtype}: give uint8, or floating point in 0..1")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise ConfigError("a floating-point image must lie in 0..1 (not normalised, not 0..255, no NaN)")
    scaled: NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
    return scaled


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Follow `Image.convert("RGB")` of timm's and torchvision's loaders, except for 16 bits, which it would clip."""
    from PIL import Image

    if channels not in (1, 3):
        bands = len(image.getbands())
        raise ConfigError(
            f"an image of {bands} bands ({image.mode}), but the model takes {channels} channels: give arrays"
        )
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _resize(image: Image.Image, resolution: Size, preprocessing: Preprocessing) -> Image.Image:
    height, width = resized_size((image.height, image.width), resolution, preprocessing)
    if (image.height, image.width) == (height, width):
        return image
    return _filtered(image, (height, width), preprocessing, (0.0, 0.0, image.height, image.width))


def cut(
    image: Any, box: tuple[float, float, float, float], resolution: Size, preprocessing: Preprocessing, *, channels: int
) -> NDArray[np.uint8]:
    """Bring one part of an image, `box` = (top, left, bottom, right) in its own pixels, to `resolution`; uint8 (H, W, C).

    The filter is the preprocessing's; its crop plays no part. This is what a training cuts out at random.

    Raises:
        ConfigError: the array is no image, or has other channels than the model.
    """
    parts = [np.asarray(_filtered(band, resolution, preprocessing, box)) for band in to_bands(image, channels)]
    arrays = [array[:, :, None] if array.ndim == 2 else array for array in parts]
    return np.ascontiguousarray(np.concatenate(arrays, axis=2) if len(arrays) > 1 else arrays[0])


def size_of(image: Any) -> Size:
    """Return the (h, w) of a Pillow image or an array (H, W) or (H, W, C)."""
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.height, image.width)


def _filtered(
    image: Image.Image, size: Size, preprocessing: Preprocessing, box: tuple[float, float, float, float]
) -> Image.Image:
    from PIL import Image

    name = check_interpolation(preprocessing.interpolation)
    if not preprocessing.antialias and name == "bilinear":
        return Image.fromarray(_two_pixels(np.asarray(image), size, box))
    top, left, bottom, right = box
    return image.resize((size[1], size[0]), Image.Resampling[name.upper()], box=(left, top, right, bottom))


def _two_pixels(array: NDArray[np.uint8], size: Size, box: tuple[float, float, float, float]) -> NDArray[np.uint8]:
    """Interpolate linearly between two pixels along each axis; 8 bits in between, fixed point, horizontal first, as Pillow."""
    top, left, bottom, right = box
    value: NDArray[np.uint8] = array
    for axis, start, end in ((1, left, right), (0, top, bottom)):
        step = (end - start) / size[axis]
        centre = (start + (np.arange(size[axis]) + 0.5) * step - 0.5).clip(0, array.shape[axis] - 1)
        first = np.minimum(centre.astype(int), max(0, array.shape[axis] - 2))
        shape = [-1 if axis == other else 1 for other in range(array.ndim)]
        low, high = (
            (weight * (1 << _PRECISION_BITS) + 0.5).astype(np.int32).reshape(shape)
            for weight in (1 - (centre - first), centre - first)
        )
        second = np.minimum(first + 1, array.shape[axis] - 1)
        total = np.take(value, first, axis) * low + np.take(value, second, axis) * high
        value = ((total + (1 << (_PRECISION_BITS - 1))) >> _PRECISION_BITS).astype(np.uint8)
    return value


_PRECISION_BITS = 22  # of Pillow's coefficients for 8-bit images


def view(size: Size, resolution: Size, preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Return what the network sees of an image of `size` as (top, left, bottom, right) in the image's own pixels.

    A side that was padded (a crop larger than the resized image) reaches beyond the image.
    """
    resized = resized_size(size, resolution, preprocessing)
    box: list[float] = []
    for side, whole, kept in zip(size, resized, resolution):
        start = round((whole - kept) / 2.0)
        box += [start * side / whole, (start + kept) * side / whole]
    return box[0], box[2], box[1], box[3]


def resized_size(size: Size, resolution: Size, preprocessing: Preprocessing) -> Size:
    """Return the size before cropping; the branches round as torchvision's Resize and timm's ResizeKeepRatio do."""
    height, width = size
    target_height, target_width = (math.floor(side / preprocessing.crop_pct) for side in resolution)
    if preprocessing.crop_mode == "squash":
        return target_height, target_width
    if target_height == target_width:
        short, long = min(size), max(size)
        new_long = int(target_height * long / short)
        return (new_long, target_height) if height > width else (target_height, new_long)
    ratio = min(height / target_height, width / target_width)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _centre_crop(image: Image.Image, resolution: Size) -> Image.Image:
    """Crop the centre; a side that is too short (crop_pct over 1) is padded with black, as torchvision does."""
    height, width = resolution
    if image.height < height or image.width < width:
        image = _pad(image, (max(image.height, height), max(image.width, width)))
    top = round((image.height - height) / 2.0)
    left = round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, size: Size) -> Image.Image:
    from PIL import Image

    canvas = Image.new(image.mode, (size[1], size[0]))
    canvas.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
    return canvas
