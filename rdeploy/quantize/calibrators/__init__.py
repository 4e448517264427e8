"""Calibrators: each watches a stream of activations and says which range to quantize; one module each.

A calibrator defines `Options` and `observer(options) -> Observer`. Memory does not grow with the number of images.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from rdeploy import plugins


class Observer(Protocol):
    """Sees every batch of one tensor, once."""

    def update(self, array: NDArray[Any]) -> None:
        """Take in one batch of the tensor, any shape."""
        ...

    def range(self, symmetric: bool) -> tuple[float, float]:
        """Return (low, high) to quantize, low <= 0 <= high; for `symmetric` schemes -high == low."""
        ...


class Calibrator(Protocol):
    """What a module in this folder defines."""

    Options: type

    def observer(self, options: Any) -> Observer: ...


def find(name: str) -> Any:
    """Import a calibrator by name; the result satisfies `Calibrator`."""
    return plugins.find("rdeploy.quantize.calibrators", name)
