"""What a graph costs at batch 1, from the graph alone: multiply-accumulates, parameters, weight bytes, live activations.

One multiply-accumulate is one multiplication of a convolution, Gemm or MatMul (attention included), as in the literature's
"GMACs"; normalisation, activation functions and element-wise operators count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from rdeploy.results import Cost

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear")
_IN_PLACE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Erf", "Tanh", "HardSwish", "HardSigmoid")
_WEIGHTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One node: its output shape at batch 1, what it multiplies, what it holds, and the precision it is written in."""

    name: str
    op: str
    shape: tuple[int, ...]
    macs: int
    params: int
    activation_bytes: int
    precision: str


def summarize(path: Path) -> Cost:
    """Return the cost of an ONNX file."""
    graph = _with_shapes(path)
    return Cost(
        macs=sum(_macs(node) for node in graph),
        params=sum(_size(value) for value in _weights(graph)),
        weight_bytes=sum(_bytes(value) for value in graph.initializers.values()),
        activation_bytes=peak_live_bytes(graph),
    )


def layers(path: Path) -> tuple[Layer, ...]:
    """Return the layers of an ONNX file in graph order, Q/DQ pairs left out."""
    return layers_of(_with_shapes(path))


def _with_shapes(path: Path) -> ir.Graph:
    """Load a graph; files that come from elsewhere may not say the shapes inside."""
    model = ir.load(path)
    if any(value.shape is None for node in model.graph for value in node.outputs):
        from onnx_ir.passes import common

        common.ShapeInferencePass()(model)
    return model.graph


def layers_of(graph: ir.Graph) -> tuple[Layer, ...]:
    """Return the layers of a graph in its order, Q/DQ pairs left out."""
    weights = {id(value) for value in _weights(graph)}
    return tuple(_layer(node, weights) for node in graph if node.op_type not in _PAIR)


def _layer(node: ir.Node, weights: set[int]) -> Layer:
    output = node.outputs[0]
    held = [_behind_pair(value) for value in node.inputs if value is not None]
    return Layer(
        name=node.name or node.op_type,
        op=node.op_type,
        shape=_shape(output),
        macs=_macs(node),
        params=sum(_size(value) for value in held if id(value) in weights),
        activation_bytes=_bytes(output),
        precision=_precision(node),
    )


def _macs(node: ir.Node) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return 0
    outputs, a, b = _shape(node.outputs[0]), _shape(first), _shape(second)
    if node.op_type == "Conv":
        return math.prod(outputs) * math.prod(b[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    transposed = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int()
    return math.prod(outputs) * (a[0] if transposed else a[-1] if a else 1)


def peak_live_bytes(graph: ir.Graph) -> int:
    """Return the most bytes of activations that are live at once, executed in graph order, no buffer used twice early.

    Views share their input's memory, so do activation functions that alone read theirs; a tensor that only a
    QuantizeLinear reads is never written in float, and a dequantized one never exists: the kernels read the integers.
    """
    owner: dict[int, int] = {}
    size: dict[int, int] = {}
    last: dict[int, int] = {}
    nodes = list(graph)
    for value in graph.inputs:
        owner[id(value)] = id(value)
        size[id(value)] = _bytes(value)
        last[id(value)] = 0
    for step, node in enumerate(nodes):
        sources = [v for v in node.inputs if v is not None and id(v) in owner]
        if node.op_type == "DequantizeLinear" and not sources:
            continue  # a weight: the kernels read it as it is stored
        for value in sources:
            last[owner[id(value)]] = max(step, last[owner[id(value)]])
        for output in node.outputs:
            shares = bool(sources) and _shares_memory(node, sources[0])
            root = owner[id(sources[0])] if shares else id(output)
            owner[id(output)] = root
            last[root] = max(step, last.get(root, 0))
            size[root] = min(size.get(root, _bytes(output)), _bytes(output)) if node.op_type == "QuantizeLinear" else (
                size.get(root, _bytes(output))
            )  # fmt: skip
            if output.is_graph_output():
                last[root] = len(nodes)
    return _peak(nodes, owner, size, last)


def _shares_memory(node: ir.Node, source: ir.Value) -> bool:
    if node.op_type in _VIEWS:
        return True
    return node.op_type in (*_IN_PLACE, "QuantizeLinear") and len(list(source.uses())) == 1


def _peak(nodes: Iterable[ir.Node], owner: dict[int, int], size: dict[int, int], last: dict[int, int]) -> int:
    made = {owner[id(v)] for n in nodes for v in n.outputs if id(v) in owner}
    live = {root for root in last if root not in made}
    total = sum(size[root] for root in live)
    peak = total
    for step, node in enumerate(nodes):
        for output in node.outputs:
            root = owner.get(id(output))
            if root is not None and root not in live:
                live.add(root)
                total += size[root]
        peak = max(peak, total)
        for root in [root for root in live if last[root] <= step]:
            live.remove(root)
            total -= size[root]
    return peak


def _weights(graph: ir.Graph) -> list[ir.Value]:
    """Return the initializers that are the network's parameters: not scales, zero points, shapes or scalars."""
    found = []
    for value in graph.initializers.values():
        users = list(value.uses())
        if value.dtype not in _WEIGHTS or not _shape(value):
            continue
        if all(user.op_type in _PAIR and index > 0 for user, index in users):
            continue
        found.append(value)
    return found


def _behind_pair(value: ir.Value) -> ir.Value:
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        return producer.inputs[0]
    return value


def _precision(node: ir.Node) -> str:
    if any(value is not None and _behind_pair(value) is not value for value in node.inputs):
        return "int8"
    dtype = node.outputs[0].dtype
    return {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}.get(dtype, str(dtype).lower()) if dtype else "fp32"


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Return the shape with every dynamic dimension (the batch) as 1."""
    return () if value.shape is None else tuple(d if isinstance(d, int) else 1 for d in value.shape)


def _size(value: ir.Value) -> int:
    return math.prod(_shape(value))


def _bytes(value: ir.Value) -> int:
    return math.ceil(_size(value) * (value.dtype.itemsize if value.dtype is not None else 4))
