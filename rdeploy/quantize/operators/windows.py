"""Convolutions and poolings of ONNX in PyTorch, over any number of axes: a node and its inputs go in, its output comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor
from torch.nn import functional

from rdeploy.quantize.operators.attributes import attribute

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_MAX_POOL = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


@dataclass(frozen=True, slots=True)
class _Window:
    """A sliding window over some axes; `overhang` is how far, rounded up, the last one reaches beyond the padded input."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    overhang: list[int]

    def pad(self, x: Tensor, fill: float) -> Tensor:
        sides = [(low, high + more) for (low, high), more in zip(self.pads, self.overhang)]
        return _pad(x, sides, fill)


def conv(node: ir.Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Conv."""
    window = _window(node, x.shape[2:], list(w.shape[2:]))
    groups = int(attribute(node, "group", 1))
    return _CONV[w.dim() - 3](window.pad(x, 0.0), w, b, window.strides, 0, window.dilations, groups)


def conv_transpose(node: ir.Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """ConvTranspose: everything is written, then the pads are cut off."""
    rank = w.dim() - 2
    strides, dilations = (list(attribute(node, name, [1] * rank)) for name in ("strides", "dilations"))
    y = _TRANSPOSED[rank - 1](x, w, b, strides, 0, 0, int(attribute(node, "group", 1)), dilations)
    more = list(attribute(node, "output_padding", [0] * rank))
    auto = attribute(node, "auto_pad", "NOTSET")
    sizes = attribute(node, "output_shape", None)
    if sizes is None and auto.startswith("SAME"):
        sizes = [side * stride for side, stride in zip(x.shape[2:], strides)]
    if sizes is None:
        pads = _explicit(node, rank)
    else:
        totals = [have + extra - size for have, extra, size in zip(y.shape[2:], more, list(sizes)[-rank:])]
        pads = [_halves(total, more_first=auto != "SAME_UPPER") for total in totals]
    return _pad(y, [(-low, extra - high) for (low, high), extra in zip(pads, more)], 0.0)


def average_pool(node: ir.Node, x: Tensor) -> Tensor:
    """AveragePool: what lies beyond the input does not count, or counts as 0 as far as the pads go."""
    window = _window(node, x.shape[2:], list(attribute(node, "kernel_shape", [])))
    inside = x.new_ones((1, 1, *x.shape[2:]))
    if attribute(node, "count_include_pad", 0):
        inside = _pad(inside, window.pads, 1.0)
        counted = _pad(inside, [(0, more) for more in window.overhang], 0.0)
    else:
        counted = window.pad(inside, 0.0)
    return _sums(window, window.pad(x, 0.0)) / _sums(window, counted)


def max_pool(node: ir.Node, x: Tensor) -> Tensor:
    """MaxPool, without the indices."""
    window = _window(node, x.shape[2:], list(attribute(node, "kernel_shape", [])))
    padded = window.pad(x, float("-inf"))
    return _MAX_POOL[x.dim() - 3](padded, window.kernel, window.strides, 0, window.dilations)


def _sums(window: _Window, x: Tensor) -> Tensor:
    """Return the sum over each window, every channel by itself."""
    ones = x.new_ones((1, 1, *window.kernel))
    apart = x.reshape(-1, 1, *x.shape[2:])
    found = _CONV[len(window.kernel) - 1](apart, ones, None, window.strides, 0, window.dilations)
    return found.reshape(*x.shape[:2], *found.shape[2:])


def _window(node: ir.Node, sides: tuple[int, ...], kernel: list[int]) -> _Window:
    rank = len(kernel)
    strides, dilations = (list(attribute(node, name, [1] * rank)) for name in ("strides", "dilations"))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        totals = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sides, strides, reach)]
        pads = [_halves(total, more_first=auto == "SAME_LOWER") for total in totals]
    else:
        pads = _explicit(node, rank)
    overhang = [0] * rank
    if attribute(node, "ceil_mode", 0):
        overhang = [_overhang(n, pads[i], strides[i], reach[i]) for i, n in enumerate(sides)]
    return _Window(kernel, strides, dilations, pads, overhang)


def _overhang(side: int, pads: tuple[int, int], stride: int, reach: int) -> int:
    """Return how far the last window reaches beyond the pads; one that would begin in the pads at the end is left out."""
    steps = math.ceil((side + sum(pads) - reach) / stride)
    if steps * stride >= side + pads[0]:
        steps -= 1
    return max(0, steps * stride + reach - side - sum(pads))


def _explicit(node: ir.Node, rank: int) -> list[tuple[int, int]]:
    pads = list(attribute(node, "pads", [0] * 2 * rank))
    return list(zip(pads[:rank], pads[rank:]))


def _halves(total: int, *, more_first: bool) -> tuple[int, int]:
    less = total // 2
    return (total - less, less) if more_first else (less, total - less)


def _pad(x: Tensor, sides: list[tuple[int, int]], fill: float) -> Tensor:
    flat = [side for pair in reversed(sides) for side in pair]
    return functional.pad(x, flat, value=fill) if any(flat) else x
