"""Where a graph's multiply-accumulates are, as far as that decides what INT8 can gain: an ONNX file goes in, shares come out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from rdeploy.graph import cost

NARROW = 16
"""Channels below which the tiles of tensor cores and of AMX are mostly padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Shares of the MACs (0 to 1), and the longest sequence that attention runs over (0 without attention).

    `attention` multiplies two activations; `depthwise` convolutions have one channel in a group; `narrow` layers read or
    write fewer than 16 channels.
    """

    macs: int
    depthwise: float = 0.0
    attention: float = 0.0
    narrow: float = 0.0
    tokens: int = 0


def read(path: Path) -> Work:
    """Return where the work of an ONNX file is."""
    graph = ir.load(path).graph
    macs = {layer.name: layer.macs for layer in cost.layers_of(graph)}
    total = sum(macs.values())
    shares = dict.fromkeys(("depthwise", "attention", "narrow"), 0)
    for node in graph:
        if kind := _kind(node):
            shares[kind] += macs.get(node.name or "", 0)
    tokens = max((_side(n.outputs[0], -1) for n in graph if n.op_type == "Softmax" and _feeds_product(n)), default=0)
    return Work(macs=total, tokens=tokens, **{kind: part / total if total else 0.0 for kind, part in shares.items()})


def _kind(node: ir.Node) -> str | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer():
        return "attention" if node.op_type == "MatMul" else None
    if node.op_type == "Conv":
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        if groups > 1 and _side(weight, 1) == 1:
            return "depthwise"
        return "narrow" if min(_side(weight, 0), _side(weight, 1)) < NARROW else None
    return "narrow" if min(_side(weight, -1), _side(weight, -2)) < NARROW else None


def _feeds_product(node: ir.Node) -> bool:
    return any(user.op_type == "MatMul" for user in node.outputs[0].consumers())


def _side(value: ir.Value, axis: int) -> int:
    shape = value.shape
    side = shape[axis] if shape is not None and len(shape) >= abs(axis) else 0
    return side if isinstance(side, int) else 0
