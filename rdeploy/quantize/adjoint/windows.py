"""How a gradient passes a convolution, a pooling or a Resize: these are linear, and so is what goes back."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported
from rdeploy.quantize.adjoint.rules import Rule
from rdeploy.quantize.adjoint.tape import Shape, Tape, number
from rdeploy.quantize.operators.attributes import attribute


def conv(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Conv: the gradient is convolved with the kernel turned round; steps of more than 1 are a transposed convolution."""
    if i == 2:
        raise Unsupported("a bias that is computed", stage="quantize")
    groups = int(attribute(node, "group", 1))
    if i:
        return _by_weight(t, node, node.inputs[0], g, (t.shape(node.inputs[0]), t.shape(node.outputs[0])))
    return _back(t, node, g, number(node.inputs[1]).astype(np.float32), groups)


def _by_weight(
    t: Tape, node: ir.Node, image: ir.Value | None, slope: ir.Value | None, shapes: tuple[Shape, Shape]
) -> ir.Value:
    """Return the gradient by a convolution's weights: the image it reads is convolved with the gradient of what it writes.

    Strides and dilations change places. `shapes` are those of the image and of the gradient.
    """
    shape = t.shape(node.inputs[1])
    (batch, _, *before), (_, outputs, *after) = shapes
    inputs, kernel = shape[1], list(shape[2:])
    if batch != 1:
        raise Unsupported("a batch of several images", stage="quantize")
    groups = shapes[0][1] // inputs
    strides, dilations, pads = _window(t, node, kernel)
    if groups == 1 and before == after and {*kernel, *strides} == {1}:
        places = math.prod(before)
        columns = t.op("Transpose", t.reshaped(image, (inputs, places)), perm=[1, 0])
        return t.reshaped(t.op("MatMul", t.reshaped(slope, (outputs, places)), columns), shape)
    swapped = [1, 0, *range(2, len(shape))]
    image = t.op("Transpose", t.reshaped(image, (groups, inputs, *before)), perm=swapped)
    taps = t.op(
        "Conv", image, t.reshaped(slope, (outputs, 1, *after)), group=groups, kernel_shape=after, strides=dilations,
        dilations=strides, pads=pads,
    )  # fmt: skip
    rank = len(kernel)
    for d, (size, n, s, step) in enumerate(zip(before, after, strides, dilations)):
        found = (size + pads[d] + pads[rank + d] - s * (n - 1) - 1) // step + 1
        taps = t.padded(taps, 2 + d, len(shape), 0, kernel[d] - found)
    return t.op("Transpose", taps, perm=swapped)


def _back(t: Tape, node: ir.Node, g: ir.Value, weight: NDArray[np.float32], groups: int) -> ir.Value:
    """Return the gradient by what a convolution with these weights read."""
    kernel = list(weight.shape[2:])
    strides, dilations, pads = _window(t, node, kernel)
    reach = [d * (k - 1) for k, d in zip(kernel, dilations)]
    ends = [r - p for r, p in zip((*reach, *reach), pads)]
    if set(strides) == {1} and min(ends) >= 0:
        return t.op(
            "Conv", g, turned(weight, groups), pads=ends, dilations=dilations, group=groups, kernel_shape=kernel
        )
    rank = len(kernel)
    before, after = t.shape(node.inputs[0])[2:], t.shape(node.outputs[0])[2:]
    left = [
        size - ((n - 1) * s + r + 1 - pads[d] - pads[rank + d])
        for d, (size, n, s, r) in enumerate(zip(before, after, strides, reach))
    ]
    if min(left) < 0 or any(more >= max(s, d) for more, s, d in zip(left, strides, dilations)):
        raise Unsupported("a window that reaches beyond its pads", stage="quantize")
    return t.op(
        "ConvTranspose", g, weight, pads=pads, strides=strides, dilations=dilations, group=groups, output_padding=left,
        kernel_shape=kernel,
    )  # fmt: skip


def turned(weight: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """Return the weights (outputs, inputs / groups, *kernel) as those of the way back, (inputs, outputs / groups, *kernel)."""
    outputs, inputs, *kernel = weight.shape
    parts = weight.reshape(groups, outputs // groups, inputs, *kernel).swapaxes(1, 2)
    flipped = np.flip(parts.reshape(groups * inputs, outputs // groups, *kernel), axis=tuple(range(2, 2 + len(kernel))))
    return np.ascontiguousarray(flipped)


def conv_transpose(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """ConvTranspose: a convolution with the same weights."""
    if i == 2 or attribute(node, "auto_pad", "NOTSET") not in ("", "NOTSET") or "output_shape" in node.attributes:
        raise Unsupported("a transposed convolution whose size or bias is computed", stage="quantize")
    if i:
        return _by_weight(t, node, g, node.inputs[0], (t.shape(node.outputs[0]), t.shape(node.inputs[0])))
    weight = number(node.inputs[1]).astype(np.float32)
    rank = weight.ndim - 2
    names = ("strides", "dilations", "pads")
    kept = {
        name: list(attribute(node, name, [0 if name == "pads" else 1] * rank * (2 if name == "pads" else 1)))
        for name in names
    }
    made = t.op("Conv", g, weight, group=int(attribute(node, "group", 1)), kernel_shape=list(weight.shape[2:]), **kept)
    return made


def average_pool(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """AveragePool: every channel by itself, by how many values each mean is of."""
    kernel = list(attribute(node, "kernel_shape", []))
    if attribute(node, "ceil_mode", 0):
        raise Unsupported("a pooling that rounds its size up", stage="quantize")
    strides, dilations, pads = _window(t, node, kernel)
    shape, after = t.shape(node.inputs[0]), t.shape(node.outputs[0])
    counts = np.ones((1, 1), np.float32)
    for d, taps in enumerate(kernel):
        places = np.arange(after[2 + d])[:, None] * strides[d] + np.arange(taps) * dilations[d] - pads[d]
        inside = (places >= 0) & (places < shape[2 + d])
        count = np.full(after[2 + d], taps) if attribute(node, "count_include_pad", 0) else inside.sum(axis=1)
        counts = counts[..., None] * count.astype(np.float32)
    channels = shape[1]
    found = _back(t, node, t.op("Div", g, counts), np.ones((channels, 1, *kernel), np.float32), channels)
    return found


def max_pool(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """MaxPool: the largest of each window feels it."""
    shape, after = t.shape(node.inputs[0]), t.shape(node.outputs[0])
    chosen = t.ops("MaxPool", 2, node.inputs[0], **{name: value.value for name, value in node.attributes.items()})[1]
    size, count = int(np.prod(shape)), int(np.prod(after))
    zeros = t.op("ConstantOfShape", np.array([size], np.int64))
    found = t.op(
        "ScatterElements", zeros, t.reshaped(chosen, (count,)), t.reshaped(g, (count,)), axis=0, reduction="add"
    )
    return t.reshaped(found, shape)


def resize(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Resize, axis by axis: the transposed matrix of what ONNX Runtime makes of one place after the other."""
    if i:
        return None
    before, after = t.shape(node.inputs[0]), t.shape(node.outputs[0])
    if attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("sizes that keep the aspect ratio", stage="quantize")
    rank = len(before)
    axes = [int(axis) % rank for axis in attribute(node, "axes", range(rank))]
    given = node.inputs[2] if len(node.inputs) > 2 else None
    scales = dict.fromkeys(axes, 0.0)
    if given is not None and number(given).size:
        scales = dict(zip(axes, number(given).tolist()))
    else:
        scales = {axis: after[axis] / before[axis] for axis in axes}
    for axis in axes:
        if before[axis] == after[axis] and scales[axis] == 1.0:
            continue
        matrix = _matrix(t, node, axis, (before[axis], after[axis]), scales[axis] if given is not None else None)
        swapped = list(range(rank))
        swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
        g = t.op("Transpose", t.op("MatMul", t.op("Transpose", g, perm=swapped), matrix), perm=swapped)
    return g


def _matrix(t: Tape, node: ir.Node, axis: int, sides: tuple[int, int], scale: float | None) -> NDArray[np.float32]:
    """Return what each of the places after (rows) takes of each before (columns), asked of ONNX Runtime itself."""
    import onnx
    import onnxruntime

    rank, (before, after) = len(t.shape(node.inputs[0])), sides
    shape = [1] * rank
    shape[1 if axis != 1 else 0], shape[axis] = before, before
    sizes = [after if d == axis else side for d, side in enumerate(shape)]
    scales = np.array([scale if d == axis else 1.0 for d in range(rank)], np.float32)
    last = ("scales", scales) if scale is not None else ("sizes", np.array(sizes, np.int64))
    names = ["x", "", "scales"] if scale is not None else ["x", "", "", "sizes"]
    kept = {name: value.value for name, value in node.attributes.items() if name not in ("axes", "extrapolation_value")}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Resize", names, ["y"], **kept)],
        "resize",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(last[1], last[0])],
    )
    opset = onnx.helper.make_opsetid("", t.graph.opset_imports.get("", 18))
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    places = session.run(None, {"x": np.eye(before, dtype=np.float32).reshape(shape)})[0]
    first = np.asarray(places).reshape(before, after) if axis != 0 else np.asarray(places).reshape(after, before).T
    return np.ascontiguousarray(first.T)


def _window(t: Tape, node: ir.Node, kernel: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Return strides, dilations and pads, those that follow from the size as numbers."""
    rank = len(kernel)
    strides, dilations = (list(attribute(node, name, [1] * rank)) for name in ("strides", "dilations"))
    auto = attribute(node, "auto_pad", "NOTSET")
    if not auto.startswith("SAME"):
        return strides, dilations, list(attribute(node, "pads", [0] * 2 * rank))
    sides = t.shape(node.inputs[0])[2:]
    totals = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, s, k, d in zip(sides, strides, kernel, dilations)
    ]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return strides, dilations, [*less, *more] if auto == "SAME_UPPER" else [*more, *less]


RULES: dict[str, Rule] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "AveragePool": average_pool,
    "MaxPool": max_pool,
    "Resize": resize,
}
