"""Bias correction: give every layer back the mean that quantization takes from its output, by changing its bias.

Rounding shifts the mean of an activation (small values of a wide range all round to zero), and rounded weights shift what they
are multiplied with. With x the input, held within its range, and Q(x) the quantized one, the mean output of a layer moves by
W_q E[Q(x)] - W E[x]; that is subtracted from its bias (Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", ICCV 2019, with measured means in place of the analytic ones). Means are taken over the places that each
weight reads (a border's tap sees zeros), from one pass over the images, each layer apart, so no error is corrected twice.
What a range cuts off is not given back: few large values lose it, and a bias would make all places pay. For the same reason
the mean over the images leaves out the lowest and the highest quarter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize import qdq
from rdeploy.quantize.placement import Placement, is_constant, place, weight_of
from rdeploy.quantize.ranges import Range, activations
from rdeploy.quantize.sampling import ints
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
Means = dict[str, tuple[Floats, Floats]]
"""By layer, one row an image: the mean of what each weight multiplies (`mean_read`), exact and in the quantized network."""
_TRIMMED = 4
"""One image in so many is left out on either side of a mean over images."""


def observe_means(
    path: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    batches: Iterable[NDArray[np.float32]],
    *,
    keep_float: Sequence[str] = (),
) -> Means:
    """Run the FP32 graph and return the means of what every quantized layer reads, exact and rounded to its range."""
    readers: dict[str, list[ir.Node]] = {}
    for node in place(ir.load(path), scheme, keep_float=keep_float).weights:
        if node.inputs[0] is not None and node.inputs[0].name in ranges:
            readers.setdefault(node.inputs[0].name or "", []).append(node)
    seen: dict[str, list[tuple[Floats, Floats]]] = {}
    for values in activations(path, sorted(readers), batches):
        for name, array in values.items():
            rounded = fake_quantize(array, ranges[name], scheme)
            held = np.clip(array, *ranges[name])
            for node in readers[name]:
                seen.setdefault(key_of(node), []).append((mean_read(node, held), mean_read(node, rounded)))
    return {name: (np.stack([x for x, _ in pairs]), np.stack([q for _, q in pairs])) for name, pairs in seen.items()}


def key_of(node: ir.Node) -> str:
    """Return what a layer is known by: the name of its output, since nodes need none."""
    return node.outputs[0].name or ""


def mean_read(node: ir.Node, array: NDArray[np.float32]) -> Floats:
    """Return the mean of what each weight of a layer multiplies: (channels, *kernel), (channels,) for a Linear layer.

    The mean is over the layer's outputs, those at the border included: there a tap reads zeros.
    """
    if node.op_type != "Conv":
        return np.asarray(array.reshape(-1, array.shape[-1]).mean(axis=0, dtype=np.float64))
    weight = weight_of(node)
    kernel = [int(side) for side in weight.shape[2:]] if weight is not None and weight.shape is not None else []
    found: NDArray[np.floating] = array
    for d in reversed(range(len(kernel))):
        found = np.stack([_sum_read(node, found, d, tap, kernel) for tap in range(kernel[d])], axis=2 + d)
    return np.asarray(found.mean(axis=0, dtype=np.float64))


def _sum_read(
    node: ir.Node, array: NDArray[np.floating], d: int, tap: int, kernel: Sequence[int]
) -> NDArray[np.floating]:
    """Return the mean over the outputs along one axis of what one tap reads there."""
    rank, size = len(kernel), array.shape[2 + d]
    stride = ints(node, "strides", [1] * rank)[d]
    reach = ints(node, "dilations", [1] * rank)[d]
    pads = ints(node, "pads", [0] * 2 * rank)
    outputs = (size + pads[d] + pads[rank + d] - reach * (kernel[d] - 1) - 1) // stride + 1
    first = tap * reach - pads[d]
    skipped = max(0, -(first // stride))  # outputs whose tap lies before the image
    last = min(first + (outputs - 1) * stride, size - 1)
    along = [slice(None)] * array.ndim
    along[2 + d] = (
        slice(first + skipped * stride, last + 1, stride) if last >= first + skipped * stride else slice(0, 0)
    )
    return np.asarray(array[tuple(along)].sum(axis=2 + d) / outputs)


def fake_quantize(array: NDArray[np.float32], span: Range, scheme: QuantScheme) -> NDArray[np.float32]:
    """Round and clip an array as a Q/DQ pair would, staying in float."""
    scale, _, low, high = qdq.grid(span, scheme)
    quantized = np.rint(array * np.float32(1 / scale))
    np.clip(quantized, low, high, out=quantized)
    dequantized: NDArray[np.float32] = quantized * scale
    return dequantized


def apply(model: ir.Model, placement: Placement, means: Means, weights: dict[str, qdq.QuantizedWeight]) -> int:
    """Correct the biases of `model`, an FP32 graph without Q/DQ pairs, in place; return how many were corrected.

    `weights` are what the Q/DQ pairs will hold, by name (`qdq.quantize_weights`).
    Layers without a bias get one, except a MatMul that no Add follows.
    """
    corrected = 0
    for node, axis in placement.weights.items():
        weight = weight_of(node)
        if key_of(node) not in means or weight is None or weight.const_value is None:
            continue
        exact = weight.const_value.numpy().astype(np.float64)
        shift = output_shift(node, exact, dequantized(weights[weight.name or ""], axis), means[key_of(node)])
        if shift is not None and np.isfinite(shift).all():
            corrected += subtract(model.graph, node, shift)
    return corrected


def dequantized(weight: qdq.QuantizedWeight, axis: int) -> Floats:
    """Return what integers and scales stand for."""
    values, scales = weight
    along = [-1 if i == axis else 1 for i in range(values.ndim)]
    return np.asarray(values.astype(np.float64) * scales.astype(np.float64).reshape(along))


def output_shift(node: ir.Node, exact: Floats, rounded: Floats, means: tuple[Floats, Floats]) -> Floats | None:
    """Return how far the layer's mean output moves, one value per output channel; None for what is no sum of products.

    `means` have one row an image; the result is their trimmed mean.
    """
    if node.op_type == "Conv":
        if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("", "NOTSET", "VALID"):
            return None
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        return _trimmed(_conv_mean(rounded, means[1], groups) - _conv_mean(exact, means[0], groups))
    if node.op_type in ("Gemm", "MatMul") and exact.ndim == 2:
        transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
        before, after = (exact.T, rounded.T) if transposed else (exact, rounded)
        return _trimmed(np.asarray(means[1] @ after - means[0] @ before))
    return None


def _trimmed(rows: Floats) -> Floats:
    """Return the mean of every column without its lowest and its highest values."""
    cut = len(rows) // _TRIMMED
    return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))


def _conv_mean(weight: Floats, mean: Floats, groups: int) -> Floats:
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    return np.asarray(np.einsum("goi,ngi->ngo", rows, mean.reshape(len(mean), groups, -1)).reshape(len(mean), -1))


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
