"""Run a bundle with nothing but NumPy, Pillow and onnxruntime: what to copy into a program that shall not depend on rdeploy.

    python examples/plain_onnxruntime.py BUNDLE photo.jpg

It gives bit for bit what `rdeploy.load(bundle)(photo)` gives; a test compares them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def pixels(image: Image.Image, manifest: dict) -> np.ndarray:
    """Return uint8 (H, W, 3): the shorter side resized, the centre cropped, as the network was evaluated."""
    how = manifest["model"]["preprocessing"]
    height, width = manifest["variant"]["resolution"]
    image = image.convert("RGB")
    tall, wide = (math.floor(side / how["crop_pct"]) for side in (height, width))
    if how.get("crop_mode") != "squash" and tall == wide:
        short, long = sorted(image.size)
        other = int(tall * long / short)
        wide, tall = (wide, other) if image.height > image.width else (other, tall)
    elif how.get("crop_mode") != "squash":
        ratio = min(image.height / tall, image.width / wide)
        tall, wide = max(1, round(image.height / ratio)), max(1, round(image.width / ratio))
    if (tall, wide) != (image.height, image.width):
        image = resized(image, wide, tall, how)
    top, left = round((tall - height) / 2.0), round((wide - width) / 2.0)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def resized(image: Image.Image, wide: int, tall: int, how: dict) -> Image.Image:
    """Resize with Pillow's antialiased filter, or, where the manifest says so, between two pixels along each axis."""
    if how["interpolation"] != "bilinear" or how.get("antialias", True):
        return image.resize((wide, tall), Image.Resampling[how["interpolation"].upper()])
    array = np.asarray(image)
    for axis, size in ((1, wide), (0, tall)):
        last = array.shape[axis] - 1
        centre = ((np.arange(size) + 0.5) * (last + 1) / size - 0.5).clip(0, last)
        first = np.minimum(centre.astype(int), max(0, last - 1))
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        low, high = (
            (w * (1 << 22) + 0.5).astype(np.int32).reshape(shape) for w in (1 - (centre - first), centre - first)
        )
        total = np.take(array, first, axis) * low + np.take(array, np.minimum(first + 1, last), axis) * high
        array = ((total + (1 << 21)) >> 22).astype(np.uint8)
    return Image.fromarray(array)


def normalised(image: np.ndarray, manifest: dict) -> np.ndarray:
    """Return float32 (1, 3, H, W), in the order of operations of PyTorch's ToTensor and Normalize."""
    how = manifest["model"]["preprocessing"]
    mean, std = (np.array(how[name], np.float32) for name in ("mean", "std"))
    scaled = (image / np.float32(255)).astype(np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1)[None])


def run(bundle: Path, image: Image.Image) -> np.ndarray:
    """Return the network's first output for one image."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    engine = next(one for one in manifest["engines"] if one["backend"] == "onnxruntime")
    options = onnxruntime.SessionOptions()
    if engine["executed_precision"].get("int8"):  # else the weights of Linear layers are dequantized on every run
        session = onnxruntime.InferenceSession(
            str(bundle / engine["path"]), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],
        )  # fmt: skip
    else:
        session = onnxruntime.InferenceSession(
            str(bundle / engine["path"]), options, providers=["CPUExecutionProvider"]
        )
    given = normalised(pixels(image, manifest), manifest)
    return session.run(None, {session.get_inputs()[0].name: given})[0]


if __name__ == "__main__":
    folder, picture = map(Path, sys.argv[1:])
    scores = run(folder, Image.open(picture))[0]
    names = (folder / "labels.txt").read_text().splitlines() if (folder / "labels.txt").is_file() else []
    for index in np.argsort(-scores)[:5]:
        print(f"{scores[index]:8.3f}  {names[index] if index < len(names) else index}")
