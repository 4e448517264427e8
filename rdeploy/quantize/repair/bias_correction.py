"""Bias correction: give every layer back the mean that quantization takes from its output, by changing its bias.

Clipping and rounding shift the mean of an activation (small values of a wide range all round to zero), and rounded weights
shift what they are multiplied with. With x the input and Q(x) the quantized one, the mean output of a layer moves by
W_q E[Q(x)] - W E[x]; that is subtracted from its bias (Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", ICCV 2019, with measured means in place of the analytic ones). Means are per channel, from one pass
over the images, each layer apart, so no error is corrected twice. Padding is accounted for: a border's tap sees zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize import qdq
from rdeploy.quantize.importance import channel_axes
from rdeploy.quantize.placement import Placement, is_constant, weight_of
from rdeploy.quantize.ranges import Range, activations
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
Means = dict[str, tuple[Floats, Floats]]


def observe_means(
    path: Path, ranges: dict[str, Range], scheme: QuantScheme, batches: Iterable[NDArray[np.float32]]
) -> Means:
    """Run the FP32 graph and return, for every tensor with a range, the per-channel means of x and of Q(x)."""
    axes = channel_axes(ir.load(path).graph)
    sums: dict[str, list[Floats]] = {}
    count = 0
    for values in activations(path, sorted(ranges), batches):
        count += 1
        for name, array in values.items():
            other = tuple(i for i in range(array.ndim) if i != axes.get(name, 1))
            means = (array.mean(other), fake_quantize(array, ranges[name], scheme).mean(other))
            total = sums.setdefault(name, [np.zeros(means[0].shape), np.zeros(means[0].shape)])
            total[0] += means[0]
            total[1] += means[1]
    return {name: (x / count, q / count) for name, (x, q) in sums.items()}


def fake_quantize(array: NDArray[np.float32], span: Range, scheme: QuantScheme) -> NDArray[np.float32]:
    """Round and clip an array as a Q/DQ pair would, staying in float."""
    scale, zero_point = qdq.scale_and_zero_point(span, scheme.activations)
    limits = np.iinfo(zero_point.dtype)
    quantized = np.rint(array * np.float32(1 / scale))
    np.clip(quantized, limits.min - int(zero_point), limits.max - int(zero_point), out=quantized)
    dequantized: NDArray[np.float32] = quantized * scale
    return dequantized


def apply(model: ir.Model, placement: Placement, means: Means, weights: dict[str, qdq.QuantizedWeight]) -> int:
    """Correct the biases of `model`, an FP32 graph without Q/DQ pairs, in place; return how many were corrected.

    `weights` are what the Q/DQ pairs will hold, by name (`qdq.quantize_weights`).
    Layers without a bias get one, except a MatMul that no Add follows.
    """
    corrected = 0
    for node, axis in placement.weights.items():
        source, weight = node.inputs[0], weight_of(node)
        if source is None or source.name not in means or weight is None or weight.const_value is None:
            continue
        exact = weight.const_value.numpy().astype(np.float64)
        values, scales = weights[weight.name or ""]
        shape = [1] * exact.ndim
        shape[axis] = -1
        shift = _output_shift(
            node, exact, values.astype(np.float64) * scales.reshape(shape).astype(np.float64), means[source.name]
        )
        if shift is not None and np.isfinite(shift).all():
            corrected += subtract(model.graph, node, shift)
    return corrected


def _output_shift(node: ir.Node, exact: Floats, rounded: Floats, means: tuple[Floats, Floats]) -> Floats | None:
    """Return how far the layer's mean output moves, one value per output channel."""
    if node.op_type == "Conv":
        seen = _share_of_outputs(node, exact.shape)
        if seen is None:
            return None
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        return _conv_mean(rounded * seen, means[1], groups) - _conv_mean(exact * seen, means[0], groups)
    if node.op_type in ("Gemm", "MatMul") and exact.ndim == 2:
        transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
        before, after = (exact.T, rounded.T) if transposed else (exact, rounded)
        return np.asarray(means[1] @ after - means[0] @ before)
    return None


def _conv_mean(weight: Floats, mean: Floats, groups: int) -> Floats:
    taps = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).sum(axis=-1)
    return np.asarray((taps * mean.reshape(groups, 1, -1)).sum(axis=-1).reshape(-1))


def _share_of_outputs(node: ir.Node, shape: tuple[int, ...]) -> Floats | None:
    """Return, for each tap of the kernel, the share of output positions at which it reads the image, not the padding."""
    source, output = node.inputs[0], node.outputs[0]
    rank = len(shape) - 2
    if source is None or source.shape is None or output.shape is None:
        return None
    strides, dilations = _ints(node, "strides", [1] * rank), _ints(node, "dilations", [1] * rank)
    pads = _ints(node, "pads", [0] * 2 * rank)
    share = np.ones((1, 1, *shape[2:]))
    for d in range(rank):
        size, outputs = source.shape[2 + d], output.shape[2 + d]
        if not isinstance(size, int) or not isinstance(outputs, int):
            return None
        taps = np.arange(shape[2 + d])[:, None] * dilations[d] + np.arange(outputs)[None] * strides[d] - pads[d]
        inside = ((taps >= 0) & (taps < size)).mean(axis=1)
        share = share * inside.reshape([-1 if i == 2 + d else 1 for i in range(len(shape))])
    return share


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def holder(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the node that holds a layer's bias and its input: the layer, or the Add that follows a MatMul; None if neither."""
    if node.op_type != "MatMul":
        return (node, 2) if len(node.inputs) < 3 or node.inputs[2] is None or is_constant(node.inputs[2]) else None
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0][0].op_type != "Add" or not is_constant(users[0][0].inputs[1 - users[0][1]]):
        return None
    held = users[0][0].inputs[1 - users[0][1]]
    weight = weight_of(node)
    columns = weight.shape[-1] if weight is not None and weight.shape is not None else 0
    size = held.const_value.size if held is not None and held.const_value is not None else 0
    return (users[0][0], 1 - users[0][1]) if size == columns else None


def subtract(graph: ir.Graph, node: ir.Node, shift: Floats) -> bool:
    """Subtract `shift` from the layer's bias: its own, the constant of the Add that follows it, or a new one."""
    found = holder(node)
    if found is None:
        return False
    place_, index = found
    old = place_.inputs[index] if len(place_.inputs) > index else None
    tensor = old.const_value if old is not None else None
    if old is not None and (tensor is None or tensor.numpy().size != shift.size):
        return False
    bias = np.zeros(shift.size) if tensor is None else tensor.numpy().astype(np.float64)
    corrected = (bias - shift.reshape(bias.shape)).astype(np.float32)
    value = qdq.constant(graph, f"{node.name}_corrected_bias", corrected)
    if len(place_.inputs) <= index:
        place_.resize_inputs(index + 1)
    place_.replace_input_with(index, value)
    return True
