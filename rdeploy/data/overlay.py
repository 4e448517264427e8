"""Answers drawn on the image that they are about: class maps and boxes go in, a Pillow image comes out."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

_GOLDEN = 0.618033988749895


def colour(index: int) -> tuple[int, int, int]:
    """Return a colour for a class that neighbouring classes do not have; the same one every time."""
    hue = (index * _GOLDEN) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if index % 2 else 0.6, 0.95 if index % 3 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def paint_classes(image: Image.Image, classes: NDArray[Any], *, strength: float = 0.5) -> Image.Image:
    """Blend the colours of a class map (H, W) into an image of that size; pixels of -1 are left as they are."""
    from PIL import Image

    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    known = np.unique(classes)
    for index in known[known >= 0]:
        there = classes == index
        pixels[there] += strength * (np.array(colour(int(index)), np.float32) - pixels[there])
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], classes: Sequence[int], texts: Sequence[str]
) -> Image.Image:
    """Draw boxes (left, top, right, bottom) with a text above each."""
    from PIL import ImageDraw

    drawn = image.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    for box, index, text in zip(boxes, classes, texts):
        left, top, right, bottom = (round(side) for side in box)
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour(index), width=2)
        pen.text((left + 2, max(0, top - 11)), text, fill=colour(index))
    return drawn
