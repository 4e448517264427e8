"""How far the channels of a graph's tensors go: a graph and images go in, the typical extremes of every channel come out.

The extremes of one image are one number each; over the images their mean plus the fourth root of their fourth central moment
stands for them. A channel that answers to one class is silent on most images, and its mean says nothing of what it is on the
others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize.channels import Axes, groups
from rdeploy.quantize.ranges import activations

Floats = NDArray[np.float64]
_POWERS = np.arange(1, 5)[:, None, None]
_LARGEST = 64.0
"""One half of the images says no more about the other than this."""


@dataclass(frozen=True, slots=True)
class Channels:
    """What was seen of the channels of a tensor: the extremes of an image, the mean square, the largest value of any.

    `spread` is by how much the larger half of the images went above the other half, 1 at least; it and `highest` say what
    other images may hold.
    """

    low: Floats
    high: Floats
    mean_square: Floats
    highest: Floats
    spread: Floats

    def moved(self, by: Floats) -> Channels:
        """Return what is seen when `by` is subtracted."""
        square = np.maximum(self.mean_square - np.square(by), self.mean_square * 0.05)
        return Channels(self.low - by, self.high - by, square, self.highest - by, self.spread)

    def reach(self, margin: float) -> Floats:
        """Return what the largest value may be on other images; a channel that was never seen above 0 may be anything."""
        known = np.where(self.highest > 0, self.highest, np.inf)
        return np.asarray(known * np.maximum(margin, self.spread))


@dataclass(slots=True)
class Seen:
    """Sums over images: a few numbers a channel, whatever the number of images.

    `powers` (4, 2, C) are those of the lowest and highest value of an image, `halves` (2, C) the highest of every other image.
    """

    powers: Floats
    squares: Floats
    halves: Floats
    images: int = 0

    @classmethod
    def nothing(cls, channels: int) -> Seen:
        """Return the sums over no image."""
        return cls(np.zeros((4, 2, channels)), np.zeros(channels), np.zeros((2, channels)))

    def add(self, array: NDArray[np.float32], axes: Axes) -> None:
        """Add what one image holds in a tensor with its channels along `axes`."""
        others = tuple(i for i in range(array.ndim) if i not in axes)
        ends = np.stack([array.min(others).reshape(-1), array.max(others).reshape(-1)]).astype(np.float64)
        self.powers += ends[None] ** _POWERS
        self.squares += np.square(array).mean(others, dtype=np.float64).reshape(-1)
        half = self.images % 2
        self.halves[half] = np.maximum(self.halves[half], ends[1])
        self.images += 1

    def with_others(self, other: Seen) -> Seen:
        """Return the sums over the images of both."""
        return Seen(
            self.powers + other.powers,
            self.squares + other.squares,
            np.maximum(self.halves, other.halves),
            self.images + other.images,
        )

    def channels(self) -> Channels:
        """Return what it says about the channels."""
        first, second, third, fourth = self.powers / self.images
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        beyond = np.maximum(central, 0.0) ** 0.25
        higher, lower = self.halves.max(axis=0), self.halves.min(axis=0)
        spread = higher / np.maximum(lower, higher / _LARGEST).clip(1e-30)
        low, high = first[0] - beyond[0], first[1] + beyond[1]
        return Channels(low, high, self.squares / self.images, higher, np.maximum(spread, 1.0))


def observe(path: Path, batches: Iterable[NDArray[np.float32]]) -> dict[str, Seen]:
    """Watch the channels of every tensor that could be scaled."""
    axes: dict[str, Axes] = {}
    for group in groups(ir.load(path).graph):
        axes.update(group.tensors)
    seen: dict[str, Seen] = {}
    for values in activations(path, sorted(axes), batches):
        for name, array in values.items():
            if name not in seen:
                seen[name] = Seen.nothing(int(np.prod([array.shape[axis] for axis in axes[name]])))
            seen[name].add(array, axes[name])
    return seen


def channels_of(seen: Mapping[str, Seen]) -> dict[str, Channels]:
    """Return what was seen of every tensor's channels, by name."""
    return {name: one.channels() for name, one in seen.items()}
