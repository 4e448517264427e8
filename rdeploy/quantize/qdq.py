"""Write explicit Q/DQ pairs into a graph: a placement and ranges go in, an INT8 graph comes out.

TensorRT's rules hold for every graph: weights INT8, symmetric, per channel; activations per tensor; biases untouched.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.graph import simplify
from rdeploy.quantize.placement import Placement, weight_of
from rdeploy.quantize.ranges import Lowered, Range, Signed
from rdeploy.types import QuantScheme

_SMALLEST_SCALE = 1e-8
"""Of a weight."""
_SMALLEST_STEP = 1e-25
"""Of an activation: behind layers of LayerScale that are still at their start, values of 1e-16 may decide."""
_CLIPS = np.linspace(1.0, 0.7, 13)
_LARGEST_BIAS = 2**30
"""What a bias may reach in steps of the products: ONNX Runtime adds it in 32 bits, and its sums need room too."""
_SUFFIXES = (
    "_int8",
    "_scale",
    "_zero_point",
    "_quantized",
    "_dequantized",
    "_narrowed",
    "_narrowed_low",
    "_narrowed_high",
)

QuantizedWeight = tuple[NDArray[np.int8], NDArray[np.float32]]
"""INT8 values, and one scale per channel."""
SIMULATED = "rdeploy.simulated"
"""The ONNX metadata of a graph whose widths no runtime executes."""


def quantize_weights(
    graph: ir.Graph, placement: Placement, scheme: QuantScheme, known: dict[tuple[str, int, int], QuantizedWeight]
) -> dict[str, QuantizedWeight]:
    """Return every placed weight quantized, by its name; `known` keeps them between calls, schemes and calibrators."""
    found: dict[str, QuantizedWeight] = {}
    for node, axis in placement.weights.items():
        weight = weight_of(node)
        if weight is None or weight.name is None or weight.const_value is None:
            continue
        key = (weight.name, axis, scheme.weight_max)
        if key not in known:
            known[key] = quantize_weight(weight.const_value.numpy().astype(np.float32), axis, scheme.weight_max)
        found[weight.name] = known[key]
    return found


def insert(
    model: ir.Model,
    placement: Placement,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    weights: dict[str, QuantizedWeight] | None = None,
) -> None:
    """Add Q/DQ pairs to `model`, in place. Every tensor that `placement` reads needs a range.

    `weights` are those of `quantize_weights`, computed here when not given.
    """
    weights = quantize_weights(model.graph, placement, scheme, {}) if weights is None else weights
    weights = _with_room_for_biases(placement, ranges, scheme, weights)
    dequantized: dict[str, ir.Value] = {}
    tag = _fresh_tag(model.graph)
    for node, axis in placement.weights.items():
        weight = weight_of(node)
        if weight is None or weight.name is None:
            continue
        if weight.name not in dequantized:
            constants = _weight_constants(model.graph, weight.name, weights[weight.name], tag)
            dequantized[weight.name] = _dequantized_weight(weight, constants, axis=axis, tag=tag, before=node)
        node.replace_input_with(1, dequantized[weight.name])
    for name, readers in placement.reads.items():
        source = readers[0][0].inputs[readers[0][1]]
        if source is None:
            continue
        value = _dequantized_activation(model.graph, source, ranges[name], scheme, tag)
        for node, index in readers:
            node.replace_input_with(index, value)
    simplify.drop_unused_initializers(model.graph)
    model.graph.sort()
    if narrow := simulated(scheme):
        model.metadata_props[SIMULATED] = narrow


def simulated(scheme: QuantScheme) -> str | None:
    """Say that no runtime executes a scheme's widths as such; None for 8 bits, and for the 7 of weights without VNNI."""
    weights = scheme.weight_max.bit_length() + 1
    if weights >= 7 and scheme.activation_bits == 8:
        return None
    return (
        f"simulated: weights of {weights} bits, activations of {scheme.activation_bits}, in Q/DQ pairs of 8 bits; "
        "executed as INT8, no faster and no smaller"
    )


def scale_and_zero_point(span: Range, activations: str, bits: int = 8) -> tuple[np.float32, np.integer]:
    """Return the scale and zero point of a range: "int8" is symmetric with zero point 0, "uint8" is affine.

    A signed range is symmetric in either; a lowered one has a zero point, until `lowering.lower` folds it into biases.
    """
    low, high = span
    activations = "int8" if isinstance(span, Signed) else activations
    half, steps = 2 ** (bits - 1), 2**bits - 1
    if activations == "int8" and not isinstance(span, Lowered):
        return np.float32(max(high, -low, _SMALLEST_STEP * (half - 1)) / (half - 1)), np.int8(0)
    scale = max((high - low) / steps, _SMALLEST_STEP)
    zero_point = np.clip(round(-low / scale), 0, steps)
    return np.float32(scale), np.int8(zero_point - half) if activations == "int8" else np.uint8(zero_point)


def grid(span: Range, scheme: QuantScheme) -> tuple[np.float32, np.integer, int, int]:
    """Return the scale, the zero point, and the ends of the integers with the zero point taken off."""
    scale, zero_point = scale_and_zero_point(span, scheme.activations, scheme.activation_bits)
    half = 2 ** (scheme.activation_bits - 1)
    low = -half - int(zero_point) if zero_point.dtype == np.int8 else -int(zero_point)
    return scale, zero_point, low, low + 2 * half - 1


def narrowed(graph: ir.Graph, source: ir.Value, span: Range, scheme: QuantScheme, name: str) -> list[ir.Node]:
    """Return the Clip that holds what an 8-bit pair rounds to fewer bits; none for 8 bits."""
    if scheme.activation_bits == 8:
        return []
    scale, _, low, high = grid(span, scheme)
    ends = [
        constant(graph, f"{name}_{end}", np.asarray(np.float32(integer) * scale))
        for end, integer in (("low", low), ("high", high))
    ]
    return [_node("Clip", [source, *ends], name, like=source)]


def quantize_weight(
    weight: NDArray[np.float32], axis: int, weight_max: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return INT8 values and one scale per channel of `axis`, each clipped where that lowers its squared error."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    peak = np.maximum(np.abs(rows).max(axis=1), _SMALLEST_SCALE * weight_max)
    best, scale = np.full(len(rows), np.inf), peak / weight_max
    for clip in _CLIPS:
        candidate = (peak * clip / weight_max)[:, None]
        error = np.square(np.clip(np.rint(rows / candidate), -weight_max, weight_max) * candidate - rows).sum(axis=1)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, candidate[:, 0], scale)
    shape = [1] * weight.ndim
    shape[axis] = -1
    quantized = np.clip(np.rint(weight / scale.reshape(shape)), -weight_max, weight_max).astype(np.int8)
    return quantized, scale.astype(np.float32)


def _with_room_for_biases(
    placement: Placement, ranges: dict[str, Range], scheme: QuantScheme, weights: dict[str, QuantizedWeight]
) -> dict[str, QuantizedWeight]:
    """Return the weights with the scales of near-zero channels raised until their biases fit 32 bits.

    ONNX Runtime (its optimizer WeightBiasQuantization) rounds the bias of Conv and Gemm to steps of input scale x weight scale.
    Where a trained channel is dead, its weights are about 1e-6 and the steps so fine that the bias overflows: silently, and
    the channel then holds anything. The raised scale rounds such weights to zero, which is less than 1e-6 of the bias.
    """
    found = dict(weights)
    for node in placement.weights:
        weight, source = weight_of(node), node.inputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if weight is None or source is None or bias is None or bias.const_value is None or source.name not in ranges:
            continue
        values, scales = found[weight.name or ""]
        array = np.abs(bias.const_value.numpy().astype(np.float64)).reshape(-1)
        step, _ = scale_and_zero_point(ranges[source.name], scheme.activations, scheme.activation_bits)
        if array.size != scales.size:  # one scale for several outputs, as ConvTranspose in groups has
            array = np.broadcast_to(array.max(), scales.shape)
        raised = np.maximum(scales, (array / (float(step) * _LARGEST_BIAS)).astype(np.float32))
        if (raised > scales).any():
            axis = placement.weights[node]
            ratio = (scales / raised).reshape([-1 if d == axis else 1 for d in range(values.ndim)])
            found[weight.name or ""] = np.rint(values * ratio).astype(np.int8), raised
    return found


def _fresh_tag(graph: ir.Graph) -> str:
    """Return what new names end with besides their suffix, so that none of them is in the graph already."""
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    names, tag = [value.name or "" for value in values], ""
    while any(name.endswith(tuple(suffix + tag for suffix in _SUFFIXES)) for name in names):
        tag += "_qdq"
    return tag


def _weight_constants(graph: ir.Graph, name: str, quantized: QuantizedWeight, tag: str) -> list[ir.Value]:
    """Return the integers and the scales. No zero points, which are all 0: with them ONNX Runtime's GEMM sums its rows first."""
    values, scales = quantized
    return [
        constant(graph, f"{name}_int8{tag}", values),
        constant(graph, f"{name}_scale{tag}", scales),
    ]


def _dequantized_weight(
    weight: ir.Value, constants: list[ir.Value], *, axis: int, tag: str, before: ir.Node
) -> ir.Value:
    name = f"{weight.name}_dequantized{tag}"
    node = _node("DequantizeLinear", constants, name, like=weight, attributes={"axis": axis})
    before.prepend(node)
    return node.outputs[0]


def _dequantized_activation(graph: ir.Graph, source: ir.Value, span: Range, scheme: QuantScheme, tag: str) -> ir.Value:
    scale, zero_point, _, _ = grid(span, scheme)
    pair = [
        constant(graph, f"{source.name}_scale{tag}", np.asarray(scale)),
        constant(graph, f"{source.name}_zero_point{tag}", np.asarray(zero_point)),
    ]
    clip = narrowed(graph, source, span, scheme, f"{source.name}_narrowed{tag}")
    held = clip[0].outputs[0] if clip else source
    quantize = _node("QuantizeLinear", [held, *pair], f"{source.name}_quantized{tag}", like=source)
    quantize.outputs[0].dtype = ir.DataType.INT8 if zero_point.dtype == np.int8 else ir.DataType.UINT8
    dequantized = f"{source.name}_dequantized{tag}"
    dequantize = _node("DequantizeLinear", [quantize.outputs[0], *pair], dequantized, like=source)
    producer = source.producer()
    if producer is None:
        graph.insert_before(graph[0], [*clip, quantize, dequantize])
    else:
        graph.insert_after(producer, [*clip, quantize, dequantize])
    return dequantize.outputs[0]


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Add an initializer to the graph and return it."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(
    op: str, inputs: list[ir.Value], name: str, *, like: ir.Value, attributes: dict[str, int] | None = None
) -> ir.Node:
    node = ir.node(op, inputs, attributes=attributes or {}, name=f"{op}_{name}")
    node.outputs[0].name = name
    node.outputs[0].shape, node.outputs[0].type = like.shape, ir.TensorType(like.dtype or ir.DataType.FLOAT)
    return node
