"""Resize of ONNX in PyTorch, axis by axis: a node and its inputs go in, the resized tensor comes out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from rdeploy.errors import Unsupported
from rdeploy.quantize.operators.attributes import attribute


def resize(node: ir.Node, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    """Resize: nearest, linear and cubic; with antialiasing over the last two axes."""
    axes = [int(axis) % x.dim() for axis in attribute(node, "axes", range(x.dim()))]
    before = torch.tensor([x.shape[axis] for axis in axes])
    if sizes is None:
        sizes = (scales * before).floor()  # in float32, as ONNX Runtime rounds
    else:
        scales = sizes / before
    asked = {axis: (int(size), float(scale)) for axis, size, scale in zip(axes, sizes, scales)}
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("sizes that keep the aspect ratio", stage="quantize")
    if attribute(node, "antialias", 0):
        return _antialiased(node, x, [asked[axis][0] for axis in (x.dim() - 2, x.dim() - 1)])
    for axis, (size, scale) in asked.items():
        if size != x.shape[axis] or scale != 1.0:
            x = _along(node, x, axis, _coordinates(node, x.shape[axis], size, scale))
    return x


def _antialiased(node: ir.Node, x: Tensor, sizes: list[int]) -> Tensor:
    aligned = attribute(node, "coordinate_transformation_mode", "half_pixel") == "align_corners"
    smooth = {"linear": "bilinear", "cubic": "bicubic"}[attribute(node, "mode", "nearest")]
    return functional.interpolate(x, sizes, mode=smooth, align_corners=aligned, antialias=True)


def _coordinates(node: ir.Node, before: int, after: int, scale: float) -> Tensor:
    """Return where each of the `after` samples lies among those `before`."""
    place = torch.arange(after, dtype=torch.float32)  # as ONNX Runtime, where two pixels are as near
    mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return place / scale
    if mode == "align_corners":
        return place * ((before - 1) / (after - 1) if after > 1 else 0.0)
    if mode == "pytorch_half_pixel" and after == 1:
        return place * 0.0
    if mode == "half_pixel_symmetric":
        shift = before / 2 * (1 - after / (scale * before))
        return shift + (place + 0.5) / scale - 0.5
    if mode not in ("half_pixel", "pytorch_half_pixel"):
        raise Unsupported(f"coordinates by {mode}", stage="quantize")
    return (place + 0.5) / scale - 0.5


def _along(node: ir.Node, x: Tensor, axis: int, coordinates: Tensor) -> Tensor:
    """Return the samples at these coordinates of one axis; beyond its ends the last value goes on."""
    mode = attribute(node, "mode", "nearest")
    if mode == "nearest":
        return x.index_select(axis, _rounded(node, coordinates).clamp(0, x.shape[axis] - 1))
    first = coordinates.floor().long()
    parts = coordinates - first
    weights = _cubic(parts, attribute(node, "cubic_coeff_a", -0.75)) if mode == "cubic" else [1 - parts, parts]
    taps = [first + i - (len(weights) // 2 - 1) for i in range(len(weights))]
    if attribute(node, "exclude_outside", 0):
        weights = [torch.where((t >= 0) & (t < x.shape[axis]), w, 0.0) for t, w in zip(taps, weights)]
        weights = [w / sum(weights) for w in weights]
    shape = [-1 if i == axis else 1 for i in range(x.dim())]
    picked = [x.index_select(axis, tap.clamp(0, x.shape[axis] - 1)) for tap in taps]
    return torch.stack([p * w.to(x.dtype).reshape(shape) for p, w in zip(picked, weights)]).sum(dim=0)


def _rounded(node: ir.Node, coordinates: Tensor) -> Tensor:
    by = {
        "round_prefer_floor": lambda c: torch.ceil(c - 0.5),
        "round_prefer_ceil": lambda c: torch.floor(c + 0.5),
        "floor": torch.floor,
        "ceil": torch.ceil,
    }[attribute(node, "nearest_mode", "round_prefer_floor")]
    return by(coordinates).long()


def _cubic(t: Tensor, a: float) -> list[Tensor]:
    """Return the weights of the four neighbours (Keys' kernel)."""
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (t, 1 - t)]
    far = [a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in (1 + t, 2 - t)]
    return [far[0], near[0], near[1], far[1]]
