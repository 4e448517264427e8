"""Lowering: let signed integers with a zero point of 0 hold ranges that do not lie around 0.

TensorRT has no zero points, and half of its integers are lost on a ReLU, most of one side on a GELU. Where convolutions
without padding and Linear layers alone read a tensor, the zero point of its range can go into biases: the layer in front, or
the Add of smoothing, gives up z steps in all channels, the limits of a ReLU or Clip in between move along, and the layers
behind add z times their weights. That is exact in float, the integers are those of an affine range, and it costs nothing at
run time: Clip(x, 0, 6) becomes Clip(x, -z, 6 - z).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from rdeploy.graph import simplify
from rdeploy.quantize import qdq
from rdeploy.quantize.channels import SMOOTHED, clip_limit, is_relu_n
from rdeploy.quantize.placement import Placement, channel_axis, weight_of
from rdeploy.quantize.ranges import Lowered, Range
from rdeploy.quantize.repair import bias_correction, centering
from rdeploy.types import QuantScheme


def names(placement: Placement, scheme: QuantScheme) -> frozenset[str]:
    """Return the tensors that `placement` reads whose zero point can be folded into biases."""
    if scheme.activations != "int8":
        return frozenset()
    shared = {name for group in placement.shared for name in group}
    found = {name: readers[0][0].inputs[readers[0][1]] for name, readers in placement.reads.items() if readers}
    quantized = frozenset(placement.reads)
    return frozenset(
        n for n, value in found.items() if n not in shared and value is not None and _can(value, quantized)
    )


def lower(
    graph: ir.Graph,
    placement: Placement,
    ranges: Mapping[str, Range],
    scheme: QuantScheme,
    weights: Mapping[str, qdq.QuantizedWeight],
) -> dict[str, Range]:
    """Fold the zero points of lowered ranges into biases, in place; return the ranges with those around 0 in their place.

    `weights` are the integers that the readers will multiply with, by the name of the weight: what they make of z is given back.
    """
    found = dict(ranges)
    held = {
        node: bias_correction.dequantized(weights[_weight_name(node)], axis)
        for node, axis in placement.weights.items()
        if _weight_name(node) in weights
    }
    for name, readers in placement.reads.items():
        if not isinstance(ranges[name], Lowered):
            continue
        value = readers[0][0].inputs[readers[0][1]]
        step, zero_point = qdq.scale_and_zero_point(ranges[name], scheme.activations, scheme.activation_bits)
        if value is not None:
            _lower(graph, value, -float(step) * int(zero_point), held)
        end = float(step) * (2 ** (scheme.activation_bits - 1) - 1)
        found[name] = -end, end
    simplify.drop_unused_initializers(graph)
    return found


def _can(value: ir.Value, quantized: frozenset[str]) -> bool:
    readers = value.consumers()
    given_back = all(
        centering.takes(node) and node.inputs[0] is value and value not in node.inputs[1:] for node in readers
    )
    if value.is_graph_output() or not readers or not given_back:
        return False
    bend = _bend(value)
    source = value if bend is None else bend.inputs[0]
    if source is None or _writer(source) is None:
        return False
    alone = len(list(source.uses())) == 1 and not source.is_graph_output()
    return bend is None or (alone and source.name not in quantized)


def _bend(value: ir.Value) -> ir.Node | None:
    """Return the ReLU, with an upper end or without, that writes a value."""
    node = value.producer()
    bends = node is not None and (node.op_type == "Relu" or (node.op_type == "Clip" and is_relu_n(node)))
    return node if bends else None


def _writer(source: ir.Value) -> ir.Node | None:
    """Return the node whose constant is the last that was added to `source`; None where there is none."""
    node = source.producer()
    if node is not None and (node.op_type == "LayerNormalization" or (node.name or "").endswith(SMOOTHED)):
        return node
    if node is not None and node.op_type == "Add":
        before = [value.producer() for value in node.inputs if value is not None]
        layers = [one for one in before if one is not None and one.op_type == "MatMul"]
        node = layers[0] if len(layers) == 1 else None
    if node is None or node.op_type not in ("Conv", "Gemm", "MatMul") or weight_of(node) is None:
        return None
    held = bias_correction.holder(node)
    return node if held is not None and held[0] is source.producer() else None


def _lower(graph: ir.Graph, value: ir.Value, by: float, held: Mapping[ir.Node, centering.Floats]) -> None:
    """Subtract `by` from a value; what holds something else now gets a name of its own."""
    bend = _bend(value)
    source = value if bend is None else bend.inputs[0]
    writer = _writer(source) if source is not None else None
    if source is None or writer is None or not by:
        return
    readers = list(dict.fromkeys(value.consumers()))
    for reader in readers:
        bias_correction.subtract(
            graph, reader, -centering.through(reader, np.full(_inputs(reader), by), held.get(reader))
        )
    centering.move(graph, writer, np.full(_inputs(readers[0]), by))
    source.name = f"{source.name}::lowered"
    if bend is None:
        return
    high = clip_limit(bend) if bend.op_type == "Clip" else np.inf
    ends = [-by] if np.isinf(high) else [-by, high - by]
    limits = [qdq.constant(graph, f"{value.name}::limit{i}", np.asarray(end, np.float32)) for i, end in enumerate(ends)]
    moved = ir.node("Clip", [source, *limits], name=bend.name)
    moved.outputs[0].dtype, moved.outputs[0].shape = value.dtype, value.shape
    moved.outputs[0].name = f"{value.name}::lowered"
    graph.insert_after(bend, moved)
    value.replace_all_uses_with(moved.outputs[0])
    graph.remove(bend, safe=True)


def _inputs(node: ir.Node) -> int:
    """Return how many channels a layer reads."""
    shape = _shape(node)
    if node.op_type == "Conv":
        return shape[1] * (node.attributes["group"].as_int() if "group" in node.attributes else 1)
    return shape[1 - channel_axis(node)]


def _shape(node: ir.Node) -> tuple[int, ...]:
    weight = weight_of(node)
    return tuple(int(side) for side in weight.shape) if weight is not None and weight.shape is not None else ()


def _weight_name(node: ir.Node) -> str:
    weight = weight_of(node)
    return (weight.name or "") if weight is not None else ""
