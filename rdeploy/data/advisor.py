"""Judge a calibration set and a preprocessing: images and pixels go in, sentences for the user come out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.data.images import ImageSet
from rdeploy.data.preprocess import normalise
from rdeploy.errors import ConfigError
from rdeploy.types import Preprocessing

Run = Callable[[NDArray[np.float32]], NDArray[Any]]

ENOUGH = 100
"""Below about this many images the tails of activations, which decide the ranges, are a matter of luck."""

_CONSTANT_LEVELS = 1.0
_MOST_COMPARED = 2000
_MOST_TRIED = 32
_FEWEST_TRIED = 4
_FEWEST_CLASSES = 10
_NEAR_BITS = 2


def advise(images: ImageSet, pixels: NDArray[np.uint8], *, asked: int) -> tuple[str, ...]:
    """Return what is doubtful about calibrating with these images, a sentence each; empty when nothing is.

    `pixels` is (N, H, W, C) as `prepare` made it; `asked` is the number of images the user wanted.

    Raises:
        ConfigError: there is no image, or every one is of a single colour.
    """
    if len(pixels) == 0:
        raise ConfigError("no calibration images: give a folder, a CSV or an array file with --calib")
    constant = int((pixels.reshape(len(pixels), -1, pixels.shape[-1]).std(axis=1).max(axis=1) < _CONSTANT_LEVELS).sum())
    if constant == len(pixels):
        raise ConfigError(
            f"all {constant} calibration images are of a single colour: give photographs like those in use"
        )
    said = (*_about_number(len(pixels), asked), *_about_skipped(images), *_about_duplicates(pixels))
    if constant:
        said = (*said, f"{constant} of {len(pixels)} calibration images are of a single colour and teach nothing")
    if images.labels is not None and len(images) > 1 and len(set(images.labels)) == 1:
        said = (*said, f"all {len(images)} calibration images are of one class: use images of all classes")
    return said


def _about_number(count: int, asked: int) -> tuple[str, ...]:
    if count < ENOUGH:
        noun = "image" if count == 1 else "images"
        return (
            f"{count} calibration {noun} ({asked} asked for): ranges may not cover what the network meets in use; "
            f"give at least {ENOUGH}",
        )
    if count < asked:
        return (f"{count} calibration images, all there are ({asked} asked for)",)
    return ()


def _about_skipped(images: ImageSet) -> tuple[str, ...]:
    if not images.skipped:
        return ()
    name, reason = images.skipped[0]
    count = len(images.skipped)
    return (f"{count} image{'s' if count > 1 else ''} skipped: {name} ({reason}){', ...' if count > 1 else ''}",)


def _about_duplicates(pixels: NDArray[np.uint8]) -> tuple[str, ...]:
    pixels = pixels[:_MOST_COMPARED]
    if len(pixels) < 2:
        return ()
    exact = Counter(hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in pixels)
    copies = len(pixels) - len(exact)
    if len(exact) == 1:
        return (f"all {len(pixels)} calibration images are the same picture: the ranges are those of one image",)
    if copies:
        return (f"{copies} of {len(pixels)} calibration images are exact copies of others and add nothing",)
    near = near_duplicates(pixels)
    if near > max(1, len(pixels) // 20):
        return (f"{near} of {len(pixels)} calibration images look the same as another one (frames of one video?)",)
    return ()


def near_duplicates(pixels: NDArray[np.uint8]) -> int:
    """Count the images that look the same as an earlier one: difference hashes (8 x 8 bits) at most 2 bits apart."""
    hashes = np.array([_difference_hash(image) for image in pixels], dtype=np.uint64)
    count = 0
    for index in range(1, len(hashes)):
        apart = np.unpackbits((hashes[:index] ^ hashes[index]).view(np.uint8).reshape(index, 8), axis=1).sum(axis=1)
        count += bool((apart <= _NEAR_BITS).any())
    return count


def _difference_hash(image: NDArray[np.uint8]) -> int:
    from PIL import Image

    grey = np.ascontiguousarray(image[:, :, :3].mean(axis=2).astype(np.uint8))
    small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


@dataclass(frozen=True)
class _Response:
    """How a classifier answers: how far each image's winner stands out, and how well answers tell the images apart."""

    peaks: NDArray[np.float64]
    information: float


def suspect_preprocessing(run: Run, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> str | None:
    """Return a sentence when the classifier answers clearly better under another usual normalisation, else None.

    `run` maps float32 (N, C, H, W) to logits (N, classes); at most 32 of `pixels` (N, H, W, C) are tried, one by one.
    Confidence alone misleads: raw 0..255 input makes many networks sure of the same few wrong classes. So the winner's
    height over the other logits, in their standard deviations (which does not change with the logits' scale), must rise
    on the same images beyond chance, and so must the mutual information between image and class.
    """
    pixels = pixels[:_MOST_TRIED]
    if len(pixels) < _FEWEST_TRIED or pixels.shape[-1] != 3:
        return None
    declared = _respond(run, pixels, preprocessing)
    if declared is None:
        return None
    best: tuple[str, _Response] | None = None
    for name, candidate, reverse in _alternatives(preprocessing):
        response = _respond(run, pixels[..., ::-1] if reverse else pixels, candidate)
        if response is not None and _clearly_better(response, best[1] if best else declared):
            best = name, response
    if best is None:
        return None
    name, response = best
    return (
        f"the preprocessing may be wrong: with mean {_show(preprocessing.mean)} and std {_show(preprocessing.std)} the "
        f"model's first choice stands {declared.peaks.mean():.2f} standard deviations above the other classes, but "
        f"{response.peaks.mean():.2f} with {name} ({len(pixels)} images)"
    )


def _alternatives(declared: Preprocessing) -> list[tuple[str, Preprocessing, bool]]:
    """List what networks are usually trained with, without what is all but the same as the declared one."""
    usual = (
        ("ImageNet's (--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("-1..1 (--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5, or 127 and 128 of 255)", (0.5,) * 3, (0.5,) * 3),
        ("0..1 (--mean 0,0,0 --std 1,1,1)", (0.0,) * 3, (1.0,) * 3),
        ("raw 0..255 (--mean 0,0,0 --std 0.00392157,0.00392157,0.00392157)", (0.0,) * 3, (1 / 255,) * 3),
    )
    here = np.array([*declared.mean, *declared.std])
    others = [
        (name, replace(declared, mean=mean, std=std), False)
        for name, mean, std in usual
        if not np.allclose(here, [*mean, *std], rtol=0.02, atol=0.005)
    ]
    return [*others, ("the channels in BGR order", declared, True)]


def _respond(run: Run, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> _Response | None:
    """Run the images one by one; None when the outputs are no finite class scores of at least ten classes."""
    batch = normalise(np.ascontiguousarray(pixels), preprocessing)
    outputs = [np.asarray(run(batch[i : i + 1])) for i in range(len(batch))]
    if any(output.ndim != 2 or output.shape[1] < _FEWEST_CLASSES for output in outputs):
        return None
    logits = np.concatenate(outputs).astype(np.float64)
    spread = logits.std(axis=1)
    if not np.isfinite(logits).all() or not (spread > 0).all():
        return None
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    return _Response(
        peaks=(logits.max(axis=1) - logits.mean(axis=1)) / spread,
        information=float(_entropy(shares.mean(axis=0)) - _entropy(shares).mean()),
    )


def _entropy(shares: NDArray[np.float64]) -> Any:
    return -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=-1)


def _clearly_better(candidate: _Response, current: _Response) -> bool:
    """Paired over the images: the peaks rise by 3 % and by 2.5 standard errors, and the information rises too."""
    rise = candidate.peaks - current.peaks
    error = rise.std(ddof=1) / np.sqrt(len(rise))
    enough = rise.mean() > max(0.03 * current.peaks.mean(), 2.5 * error)
    return bool(enough and candidate.information > current.information)


def _show(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
