"""Values of options, as a user wrote them, are checked and brought to their types: numbers, sizes, names, paths."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rdeploy import plugins
from rdeploy.errors import ConfigError
from rdeploy.types import Size

SizeLike = int | str | Size

MAX_SIDE = 8192


def number(value: Any, option: str) -> float:
    """Return an option's value as a number.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool):
        raise ConfigError(f"{option} {value!r} is not a number")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option} {value!r} is not a number") from error


def whole(value: Any, option: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{option} {value!r} is out of range: it must be a whole number from {low} to {high}")
    return value


def numbers(values: Any, option: str) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = tuple(number(value, option) for value in several(values))
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{option} needs one number per channel, such as 0.485,0.456,0.406")
    if max(map(abs, numbers)) > 3:
        raise ConfigError(
            f"{option} {max(numbers):g} is out of range: pixels are scaled to 0..1 first, divide it by 255"
        )
    return numbers


def parse_size(value: SizeLike, option: str) -> Size:
    """Return (height, width) of 168, "168", "168x224" or (168, 224).

    Raises:
        ConfigError: it is no size, or a side is not within 1 to 8192 pixels.
    """
    parts = value.lower().split("x") if isinstance(value, str) else value
    try:
        sides: tuple[Any, ...] = (parts, parts) if isinstance(parts, int) else tuple(parts)
        height, width = (int(side) for side in (sides * 2 if len(sides) == 1 else sides))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option} {value!r} is not a size; write N or HxW, such as 168 or 168x224") from error
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ConfigError(f"{option} {value} is out of range: each side must be within 1 to {MAX_SIDE} pixels")
    return height, width


def sizes(value: Any) -> tuple[Any, ...]:
    # (168, 224) is one size, [168, 224] and ((168, 224), (96, 96)) are two.
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return (value,)
    return several(value)


def several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def one_of(value: str | None, known: Iterable[str], option: str) -> str | None:
    if value is None or value in known:
        return value
    raise ConfigError(f"unknown {option} {value!r}{plugins.did_you_mean(value, known)}; there are: {', '.join(known)}")


def existing(value: Any, option: str) -> str | None:
    if value is None:
        return None
    text = str(os.fspath(value))
    if not Path(text).exists():
        raise ConfigError(f"{option} {text}: no such file or folder")
    return text


def writable(value: Any) -> str:
    """Return the output folder after the nearest folder above it that exists was found to be writable."""
    text = str(os.fspath(value))
    place = Path(text).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"out {text}: {place} is a file, not a folder; choose another --out")
    try:
        # An unnamed file: permissions do not tell of a read-only or full disk, and nothing may be left behind.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise ConfigError(
            f"out {text}: {place} cannot be written to ({error.strerror}); choose another --out"
        ) from error
    return text
