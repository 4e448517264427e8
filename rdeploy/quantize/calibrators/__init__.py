"""Calibrators: each turns what was seen of a tensor into the range to quantize; one module each.

What is seen is one streaming `Histogram` per tensor, whatever the calibrator, so memory does not grow with the number of
images, and the ranges of several calibrators and of both schemes come from a single pass over the images.
A calibrator defines `Options` and `find_range(histogram, options, *, symmetric) -> (low, high)`.
"""

from __future__ import annotations

from typing import Any, Protocol

from rdeploy import plugins
from rdeploy.quantize.histogram import Histogram


class Calibrator(Protocol):
    """What a module in this folder defines."""

    Options: type

    def find_range(self, histogram: Histogram, options: Any, *, symmetric: bool) -> tuple[float, float]:
        """Return (low, high) with low <= 0 <= high; for a symmetric scheme low == -high."""
        ...


def find(name: str) -> Any:
    """Import a calibrator by name; the result satisfies `Calibrator`."""
    return plugins.find("rdeploy.quantize.calibrators", name)


def names() -> tuple[str, ...]:
    """Return the names of all calibrators."""
    return plugins.names("rdeploy.quantize.calibrators")
