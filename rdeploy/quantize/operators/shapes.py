"""Operators of ONNX that move, cut and pad values, in PyTorch: a node and its inputs go in, its output comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from rdeploy.quantize.operators.attributes import attribute


def reshape(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    """Reshape."""
    kept = attribute(node, "allowzero", 0)
    return x.reshape([x.shape[i] if side == 0 and not kept else side for i, side in enumerate(shape.tolist())])


def squeeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze."""
    return x.squeeze(tuple(_axes(node, axes))) if axes is not None else x.squeeze()


def unsqueeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Unsqueeze."""
    wanted = _axes(node, axes)
    for axis in sorted(a % (x.dim() + len(wanted)) for a in wanted):
        x = x.unsqueeze(axis)
    return x


def _axes(node: ir.Node, axes: Tensor | None) -> list[int]:
    return list(attribute(node, "axes", [])) if axes is None else [int(a) for a in axes.tolist()]


def cut(node: ir.Node, x: Tensor, starts: Tensor, ends: Tensor, axes: Any = None, steps: Any = None) -> Tensor:
    """Slice."""
    along = axes.tolist() if axes is not None else range(len(starts))
    for axis, start, end, step in zip(
        along, starts.tolist(), ends.tolist(), steps.tolist() if steps is not None else [1] * 9
    ):
        picked = list(range(*slice(start, end if end > -(1 << 62) else None, step).indices(x.shape[axis])))
        x = x.index_select(axis, torch.tensor(picked, dtype=torch.int64, device=x.device))
    return x


def gather(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    """Gather."""
    axis = int(attribute(node, "axis", 0)) % x.dim()
    flat = indices.reshape(-1).long().to(x.device) % x.shape[axis]
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def pad(node: ir.Node, x: Tensor, pads: Tensor, value: Any = None, axes: Any = None) -> Tensor:
    """Pad: with a constant, or with the values that an index beyond the ends stands for; a negative pad cuts."""
    mode, count = attribute(node, "mode", "constant"), len(pads) // 2
    along = [int(axis) % x.dim() for axis in (axes.tolist() if axes is not None else range(count))]
    for axis, before, after in zip(along, pads[:count].tolist(), pads[count:].tolist()):
        x = x.narrow(axis, max(0, -before), x.shape[axis] + min(0, before) + min(0, after))
        before, after = max(0, before), max(0, after)
        if mode == "constant":
            sides = [0] * 2 * (x.dim() - 1 - axis) + [before, after]
            x = functional.pad(x, sides, value=float(value) if value is not None else 0.0)
        else:
            places = torch.arange(-before, x.shape[axis] + after, device=x.device)
            x = x.index_select(axis, _inside(places, x.shape[axis], mode))
    return x


def _inside(places: Tensor, size: int, mode: str) -> Tensor:
    if mode == "wrap":
        return places % size
    if mode == "edge":
        return places.clamp(0, size - 1)
    turned = places % max(1, 2 * (size - 1))  # reflect: there and back again
    return torch.minimum(turned, 2 * (size - 1) - turned)


def constant_of_shape(node: ir.Node, shape: Tensor) -> Tensor:
    """ConstantOfShape."""
    found = node.attributes.get("value")
    value = torch.from_numpy(np.array(found.as_tensor().numpy())) if found is not None else torch.zeros(1)
    return value.expand(shape.tolist())


def depth_to_space(node: ir.Node, x: Tensor) -> Tensor:
    """DepthToSpace."""
    size = int(attribute(node, "blocksize", 1))
    if attribute(node, "mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    parts = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // size**2, h * size, w * size)


def space_to_depth(node: ir.Node, x: Tensor) -> Tensor:
    """SpaceToDepth."""
    size = int(attribute(node, "blocksize", 1))
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * size**2, h // size, w // size)


def cast(node: ir.Node, x: Tensor) -> Tensor:
    """Cast; half precision stays float32, in which everything here is computed."""
    wanted = ir.DataType(int(attribute(node, "to", ir.DataType.FLOAT)))
    if wanted in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return x.to(torch.float32)
    return x.to(torch.from_numpy(np.empty(0, wanted.numpy())).dtype)
