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

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import InvariantError
from rdeploy.quantize import qdq
from rdeploy.quantize.placement import Placement, is_constant, place, weight_of
from rdeploy.quantize.ranges import Range, activations
from rdeploy.quantize.repair import folding
from rdeploy.quantize.sampling import ints
from rdeploy.quantize.spooled import Spooled
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
Weight = NDArray[np.floating]
Shifts = dict[str, Floats]
"""By layer: how far quantization moves the mean of each of its outputs, one row an image."""

_TRIMMED = 4
"""One image in so many is left out on either side of a mean over images."""


class Means:
    """By layer: the means of what each weight multiplies (`mean_read`), held within its range and rounded, a row an image.

    As large as a few networks: kept where they need no memory.
    """

    def __init__(self, layers: Sequence[str], rows: Iterable[Sequence[NDArray[np.float32]]]) -> None:
        self._places = {name: place for place, name in enumerate(layers)}
        self._rows = Spooled(rows)

    def of(self, layer: str) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return (images, ...) held and rounded; None for a layer whose input is not quantized."""
        if layer not in self._places:
            return None
        both = self._rows.column(self._places[layer])
        return both[:, 0], both[:, 1]


def observe_shifts(
    path: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    batches: Iterable[NDArray[np.float32]],
    weights: Mapping[str, qdq.QuantizedWeight],
    *,
    keep_float: Sequence[str] = (),
) -> Shifts:
    """Run the FP32 graph and return how far the outputs of every quantized layer move on each image.

    `weights` are what the Q/DQ pairs will hold, by name (`qdq.quantize_weights`).
    """
    layers = place(ir.load(path), scheme, keep_float=keep_float).weights
    return shifts_with(layers, observe_means(path, ranges, scheme, batches, keep_float=keep_float), weights)


def observe_means(
    path: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    batches: Iterable[NDArray[np.float32]],
    *,
    keep_float: Sequence[str] = (),
) -> Means:
    """Run the FP32 graph and return the means of what every quantized layer reads: they do not depend on its integers."""
    readers: dict[str, list[ir.Node]] = {}
    for node in place(ir.load(path), scheme, keep_float=keep_float).weights:
        if node.inputs[0] is not None and node.inputs[0].name in ranges:
            readers.setdefault(node.inputs[0].name or "", []).append(node)
    names = sorted(readers)

    def rows() -> Iterator[list[NDArray[np.float32]]]:
        for values in activations(path, names, batches):
            row = []
            for name in names:
                array = values.pop(name)
                both = np.clip(array, *ranges[name]), fake_quantize(array, ranges[name], scheme)
                row += [np.stack([mean_read(node, x) for x in both]).astype(np.float32) for node in readers[name]]
            yield row

    return Means([key_of(node) for name in names for node in readers[name]], rows())


def shifts_with(layers: Mapping[ir.Node, int], means: Means, weights: Mapping[str, qdq.QuantizedWeight]) -> Shifts:
    """Return how far the layers' outputs move with these integers; `layers` are those of a placement, with their axes."""
    found: Shifts = {}
    for node, axis in layers.items():
        if (seen := means.of(key_of(node))) is None:
            continue
        shift = output_shift(node, *both_weights(node, axis, weights), seen)
        if shift is not None:
            found[key_of(node)] = shift
    return found


def both_weights(node: ir.Node, axis: int, weights: Mapping[str, qdq.QuantizedWeight]) -> tuple[Weight, Weight]:
    """Return a layer's weights as they are and as they will be."""
    weight = weight_of(node)
    if weight is None or weight.const_value is None:
        raise InvariantError(f"quantize: layer {node.name!r} has no constant weights")
    return weight.const_value.numpy(), dequantized(weights[weight.name or ""], axis).astype(np.float32)


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
    rank = len(kernel)
    strides, dilations = ints(node, "strides", [1] * rank), ints(node, "dilations", [1] * rank)
    pads = ints(node, "pads", [0] * 2 * rank)
    found = array
    for size, *window in zip(array.shape[2:], kernel, strides, dilations, pads[:rank], pads[rank:]):
        found = np.moveaxis(found, 2, -1) @ _read(size, *window)
    return np.asarray(found.mean(axis=0, dtype=np.float64))


@functools.lru_cache(256)
def _read(size: int, taps: int, stride: int, reach: int, before: int, after: int) -> NDArray[np.float32]:
    """Return, along one axis, which share of the outputs reads each place by each tap: (size, taps)."""
    outputs = (size + before + after - reach * (taps - 1) - 1) // stride + 1
    places = np.arange(outputs)[:, None] * stride + np.arange(taps) * reach - before
    shares: NDArray[np.float32] = (places == np.arange(size)[:, None, None]).mean(axis=1, dtype=np.float32)
    return shares


def fake_quantize(array: NDArray[np.float32], span: Range, scheme: QuantScheme) -> NDArray[np.float32]:
    """Round and clip an array as a Q/DQ pair would, staying in float."""
    scale, _, low, high = qdq.grid(span, scheme)
    quantized = np.rint(array * np.float32(1 / scale))
    np.clip(quantized, low, high, out=quantized)
    dequantized: NDArray[np.float32] = quantized * scale
    return dequantized


def apply(model: ir.Model, placement: Placement, shifts: Shifts) -> int:
    """Take the shifts back from the biases of `model`, an FP32 graph without Q/DQ pairs, in place; return of how many layers.

    Layers without a bias get one, except a MatMul that no Add follows.
    """
    corrected = 0
    for node in placement.weights:
        rows = shifts.get(key_of(node))
        if rows is not None and np.isfinite(shift := trimmed(rows)).all():
            corrected += subtract(model.graph, node, shift)
    return corrected


def dequantized(weight: qdq.QuantizedWeight, axis: int) -> Floats:
    """Return what integers and scales stand for."""
    values, scales = weight
    along = [-1 if i == axis else 1 for i in range(values.ndim)]
    return np.asarray(values.astype(np.float64) * scales.astype(np.float64).reshape(along))


def output_shift(node: ir.Node, exact: Weight, rounded: Weight, means: tuple[Weight, Weight]) -> Floats | None:
    """Return how far the layer's mean output moves, (images, outputs); None for what is no sum of products.

    `means` are those of what each weight multiplies (`mean_read`), exact and rounded, one row an image.
    """
    if node.op_type == "Conv":
        if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("", "NOTSET", "VALID"):
            return None
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        return _conv_mean(rounded, means[1], groups) - _conv_mean(exact, means[0], groups)
    if node.op_type in ("Gemm", "MatMul") and exact.ndim == 2:
        transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
        before, after = (exact.T, rounded.T) if transposed else (exact, rounded)
        return np.asarray(means[1] @ after - means[0] @ before)
    return None


def trimmed(rows: Floats) -> Floats:
    """Return the mean of every column without its lowest and its highest values."""
    cut = len(rows) // _TRIMMED
    return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))


def _conv_mean(weight: Weight, mean: Weight, groups: int) -> Floats:
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
    bias = np.zeros(shift.size) if tensor is None else folding.array(old)
    if len(place_.inputs) <= index:
        place_.resize_inputs(index + 1)
    folding.replace(graph, place_, index, bias - shift.reshape(bias.shape))
    return True
