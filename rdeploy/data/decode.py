"""One image file: decoded, or why it cannot be."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_PHOTOGRAPHS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".dib")
_OTHERS = (".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".tga")
SUFFIXES = frozenset((*_PHOTOGRAPHS, *_OTHERS))
"""What counts as an image file in a folder; other files (labels, licences) are not mentioned."""

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError, OverflowError)
UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, *_DAMAGED, struct.error, zlib.error)
"""What Pillow raises on damaged files: it does not wrap what its format plugins run into."""


def open_image(path: Path) -> Image.Image:
    """Decode an image file, of several frames the first. EXIF orientation is not applied (see preprocess).

    Raises:
        UNREADABLE: one of these; also for more pixels than Pillow's limit, at which Pillow itself only warns.
    """
    with Image.open(path) as image:
        _refuse_bombs(image)
        image.load()
        first: Image.Image = image.copy() if getattr(image, "n_frames", 1) > 1 else image
        return first


def why_unreadable(path: Path) -> str | None:
    """Return why an image cannot be read, or None. JPEG is decoded at an eighth: all is read, little is computed."""
    try:
        if not path.is_file():
            return "there is no such file" if not path.exists() else "not a file"
        if path.stat().st_size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            _refuse_bombs(image)
            if image.format == "JPEG":
                image.draft(None, (1, 1))
            image.load()
    except UNREADABLE as error:
        return reason_of(error)
    return None


def _refuse_bombs(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height}")


def reason_of(error: Exception) -> str:
    """Return what is wrong with an image file in a few plain words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can open"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: more than {Image.MAX_IMAGE_PIXELS} (a decompression bomb?)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__
