"""How a gradient passes an operator that moves, cuts or pads values: the way back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rdeploy.errors import Unsupported
from rdeploy.quantize.adjoint.rules import Rule
from rdeploy.quantize.adjoint.tape import Tape, number
from rdeploy.quantize.operators.attributes import attribute


def same(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Identity."""
    return g


def reshape(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Reshape, Flatten, Squeeze and Unsqueeze."""
    return None if i else t.reshaped(g, t.shape(node.inputs[0]))


def transpose(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Transpose."""
    perm = list(attribute(node, "perm", range(len(t.shape(node.inputs[0])))[::-1]))
    return t.op("Transpose", g, perm=[int(axis) for axis in np.argsort(perm)])


def concat(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Concat: its part of the gradient."""
    rank = len(t.shape(node.outputs[0]))
    axis = int(attribute(node, "axis", 0)) % rank
    start = sum(t.shape(value)[axis] for value in node.inputs[:i])
    size, whole = t.shape(node.inputs[i])[axis], t.shape(node.outputs[0])[axis]
    return t.padded(g, axis, rank, -start, start + size - whole)


def split(t: Tape, node: ir.Node, gradients: list[ir.Value | None]) -> ir.Value:
    """Split: the parts joined again, zeros where nothing was felt."""
    axis = int(attribute(node, "axis", 0))
    parts = [
        gradient if gradient is not None else t.constant(np.zeros(t.shape(output), np.float32))
        for gradient, output in zip(gradients, node.outputs)
    ]
    return t.op("Concat", *parts, axis=axis)


def cut(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Slice: zeros between and around what was taken."""
    if i:
        return None
    shape, sides = t.shape(node.inputs[0]), list(t.shape(node.outputs[0]))
    starts, ends = number(node.inputs[1]).tolist(), number(node.inputs[2]).tolist()
    more = [
        number(node.inputs[j]).tolist() if len(node.inputs) > j and node.inputs[j] is not None else None for j in (3, 4)
    ]
    axes, steps = more[0] or list(range(len(starts))), more[1] or [1] * len(starts)
    rank = len(shape)
    for axis, start, end, step in zip((a % rank for a in axes), starts, ends, steps):
        if step < 1:
            raise Unsupported("a slice that goes backwards", stage="quantize")
        taken = range(*slice(start, end, step).indices(shape[axis]))
        if step > 1:
            g = t.reshaped(g, (*sides[: axis + 1], 1, *sides[axis + 1 :]))
            g = t.padded(g, axis + 1, rank + 1, 0, step - 1)
            sides[axis] *= step
            g = t.reshaped(g, tuple(sides))
        g = t.padded(g, axis, rank, taken.start, shape[axis] - taken.start - sides[axis])
        sides[axis] = shape[axis]
    return g


def gather(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Gather by constant indices: added up where they came from."""
    if i:
        return None
    shape, indices = t.shape(node.inputs[0]), number(node.inputs[1])
    axis = int(attribute(node, "axis", 0)) % len(shape)
    rows = indices.reshape(-1).astype(np.int64) % shape[axis]
    g = t.reshaped(g, (*shape[:axis], rows.size, *shape[axis + 1 :]))
    if rows.size == 1:
        return t.padded(g, axis, len(shape), int(rows[0]), shape[axis] - 1 - int(rows[0]))
    taken = np.zeros((shape[axis], rows.size), np.float32)
    taken[rows, np.arange(rows.size)] = 1.0
    swapped = list(range(len(shape)))
    swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
    back = t.op("MatMul", t.op("Transpose", g, perm=swapped), np.ascontiguousarray(taken.T))
    return t.op("Transpose", back, perm=swapped)


def pad(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Pad with a constant: cut off again."""
    if i:
        return None
    if attribute(node, "mode", "constant") != "constant":
        raise Unsupported(f"Pad by {attribute(node, 'mode', '')}", stage="quantize")
    pads, rank = number(node.inputs[1]).tolist(), len(t.shape(node.inputs[0]))
    given = number(node.inputs[3]).tolist() if len(node.inputs) > 3 and node.inputs[3] is not None else range(rank)
    for position, axis in enumerate(given):
        g = t.padded(g, axis % rank, rank, -pads[position], -pads[len(pads) // 2 + position])
    return g


def depth_to_space(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """DepthToSpace."""
    if attribute(node, "mode", "DCR") != "DCR":
        raise Unsupported("DepthToSpace by columns first", stage="quantize")
    return t.op("SpaceToDepth", g, blocksize=int(attribute(node, "blocksize", 1)))


def space_to_depth(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """SpaceToDepth."""
    return t.op("DepthToSpace", g, blocksize=int(attribute(node, "blocksize", 1)))


def cast(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Cast: between floating types nothing changes, an integer has no gradient."""
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    wanted = node.inputs[0].dtype if node.inputs[0] is not None else None
    if ir.DataType(int(attribute(node, "to", 1))) not in floats or wanted not in floats:
        return None
    return g if wanted == ir.DataType.FLOAT else t.op("Cast", g, to=int(wanted))


def pair(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """QuantizeLinear and DequantizeLinear: straight through, whatever they round and clip."""
    return None if i else g


RULES: dict[str, Rule] = {
    "Identity": same,
    "QuantizeLinear": pair,
    "DequantizeLinear": pair,
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": reshape,
    "Unsqueeze": reshape,
    "Transpose": transpose,
    "Concat": concat,
    "Slice": cut,
    "Gather": gather,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Cast": cast,
}
