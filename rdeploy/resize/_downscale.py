"""An anti-aliased downscale of a feature map, written in operators that every runtime has, in INT8 as well.

By a whole factor it is an average pooling (area interpolation). Otherwise a fixed depthwise low-pass comes first and a bilinear
resize after it. The low-pass has the variance that a bilinear sample lacks of the triangle filter for that factor: (s² - 1) / 6
pixels² on each axis, so that by a factor of 2 the two together would be exactly that filter. `Resize` with `antialias` would be
one operator, but neither OpenVINO nor TensorRT executes it.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from rdeploy.types import Size


class Downscale(nn.Module):  # type: ignore[misc]
    """Reduce (N, channels, *source) to (N, channels, *target); a constant map stays that constant, borders included."""

    def __init__(self, channels: int, source: Size, target: Size) -> None:
        super().__init__()
        self.channels, self.source, self.target = channels, source, target
        self.whole = all(old % new == 0 for old, new in zip(source, target))
        if not self.whole:
            rows, columns = (low_pass(old / new) for old, new in zip(source, target))
            kernel = (rows[:, None] * columns).expand(channels, 1, -1, -1).contiguous()
            self.border = (len(columns) // 2, len(columns) // 2, len(rows) // 2, len(rows) // 2)
            self.register_buffer("kernel", kernel)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the map at `target`."""
        if self.whole:
            steps = (self.source[0] // self.target[0], self.source[1] // self.target[1])
            return functional.avg_pool2d(features, steps, steps)
        padded = functional.pad(features, self.border, mode="replicate")
        smooth = functional.conv2d(padded, self.kernel, groups=self.channels)
        return functional.interpolate(smooth, size=self.target, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return f"{self.source} -> {self.target}"


def low_pass(factor: float) -> torch.Tensor:
    """Return the taps that go before a bilinear sample when a side shrinks by `factor`; they sum to 1.

    A triangle of half-width t, sampled at whole pixels, has a variance of (t² - 1) / 6: the triangles of the whole numbers
    around the factor are mixed such that their variance is (factor² - 1) / 6.
    """
    if factor <= 1:
        return torch.ones(1)
    below = math.floor(factor)
    share = (factor**2 - below**2) / ((below + 1) ** 2 - below**2)
    taps = share * _triangle(below + 1)
    if share < 1:
        taps = taps + (1 - share) * functional.pad(_triangle(below), (1, 1))
    return taps


def _triangle(width: int) -> torch.Tensor:
    steps = torch.arange(1 - width, width, dtype=torch.float32)
    return (width - steps.abs()) / width**2
