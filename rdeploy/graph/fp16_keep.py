"""Which layers of a graph stay FP32 when the rest becomes FP16: a graph and its largest activations go in, reasons come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

LARGEST = 65504.0
MARGIN = 4.0
"""How much larger an unseen image may make an activation than the calibration images did."""
WORST_ROUNDING = 1e-3
"""Relative error (L2) above which a constant is not rounded; normal numbers lose at most half a thousandth."""
SMALLEST_NORMAL, SMALLEST = 2.0**-14, 2.0**-24

ACCUMULATES = (
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization", "LpNormalization", "LRN",
    "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp", "GlobalAveragePool", "AveragePool", "GlobalLpPool", "LpPool", "CumSum",
)  # fmt: skip
LARGE_RANGE = ("Pow", "Exp", "Log", "Sqrt", "Reciprocal", "Softplus")
PAIR = ("QuantizeLinear", "DequantizeLinear")
ANY_INPUT = ("Shape", "Size", "Cast")
"""They read a tensor of any type; what they write does not depend on it."""
_TYPED_BY_ATTRIBUTE = ("Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")
_FLOAT = ir.DataType.FLOAT
BETWEEN = "lies between layers in FP32"
SCALE = "its scales are too small for FP16"

Reasons = dict[ir.Node, str]


def half_slots(node: ir.Node, opset: int) -> tuple[frozenset[int], frozenset[int]]:
    """Return which inputs and outputs ONNX lets be FP16 as well as FP32."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return frozenset(), frozenset()
    types = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in schema.type_constraints}

    def slots(count: int, formal: list[Any]) -> frozenset[int]:
        found = [formal[min(i, len(formal) - 1)].type_str for i in range(count)] if formal else []
        return frozenset(
            i for i, name in enumerate(found) if {"tensor(float16)", "tensor(float)"} <= types.get(name, set())
        )

    return slots(len(node.inputs), list(schema.inputs)), slots(len(node.outputs), list(schema.outputs))


def is_float(node: ir.Node) -> bool:
    """Whether a node writes float numbers: those are the layers that become FP16 or stay FP32."""
    return any(value.dtype == _FLOAT for value in node.outputs)


def reasons_of(graph: ir.Graph, largest: Mapping[str, float], *, opset: int) -> Reasons:
    """Return the layers that stay FP32 with the reason, Q/DQ pairs left out: those follow their layers."""
    reasons: Reasons = {}
    for node in graph:
        if node.op_type not in PAIR and (reason := _own_reason(node, largest, opset)):
            reasons[node] = reason
    fp32 = reasons.keys() | {n for n in graph if is_float(n) and n.op_type not in (*_WEIGHTED, *PAIR)}
    while outside := {node for node in fp32 - reasons.keys() if not _is_between(node, fp32)}:
        fp32 -= outside
    return {node: reasons.get(node, BETWEEN) for node in graph if node in fp32}


def pairs_in_fp32(graph: ir.Graph, reasons: Reasons) -> set[ir.Node]:
    """Return the Q and DQ nodes that stay FP32: a Q with what writes its input, a DQ with what reads its output.

    A DQ that layers of both kinds read is split first, so that each has its own.
    """
    found = set()
    for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
        readers = [(user, index) for user, index in node.outputs[0].uses() if user in reasons]
        if readers and len(readers) < len(list(node.outputs[0].uses())):
            node = _copied(graph, node, readers)
        if readers or node.outputs[0].is_graph_output():
            found.add(node)
    for node in [n for n in graph if n.op_type == "QuantizeLinear"]:
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if producer is None or producer in reasons or producer in found or _loses_scale(node):
            found.add(node)
    return found


def rounding_error(exact: NDArray[np.floating]) -> float:
    """Return the relative error (L2) of rounding to FP16; infinite where a finite value overflows."""
    values = exact[np.isfinite(exact)].astype(np.float64)
    if values.size and np.abs(values).max() > LARGEST:
        return float("inf")
    size = float(np.linalg.norm(values))
    return float(np.linalg.norm(values - values.astype(np.float16).astype(np.float64))) / size if size else 0.0


def denormals(values: NDArray[np.floating]) -> int:
    """Count the values that FP16 holds with fewer bits, or not at all."""
    return int(((values != 0) & (np.abs(values) < SMALLEST_NORMAL)).sum())


def half(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """Round to FP16; infinities stay."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _own_reason(node: ir.Node, largest: Mapping[str, float], opset: int) -> str | None:
    if not is_float(node) and not any(v is not None and v.dtype == _FLOAT for v in node.inputs):
        return None
    if node.op_type in ACCUMULATES:
        return "accumulates"
    if node.op_type in LARGE_RANGE:
        return "has a large range"
    if node.op_type == "Div" and node.inputs[1] is not None and not node.inputs[1].is_initializer():
        return "divides by an activation"
    if is_float(node) and not node.op_type.startswith("Cast") and not half_slots(node, opset)[1]:
        return "has no FP16 form in ONNX"
    if node.op_type in _TYPED_BY_ATTRIBUTE:
        return "writes FP32 by its attributes"
    return _out_of_range(node, largest) or next(_badly_rounded(node, opset), None)


def _out_of_range(node: ir.Node, largest: Mapping[str, float]) -> str | None:
    """Return which activation is too large for FP16, or all below its normal range: it would lose a thousandth there."""
    if node.op_type in ("Shape", "Size"):
        return None
    written = [("its output", value.name or "") for value in node.outputs]
    read = [(f"reads {name!r}, which", name) for name in map(_origin, node.inputs)]
    for which, name in (*written, *read):
        reached = largest.get(name, 0.0)
        if reached * MARGIN > LARGEST:
            return f"{which} reaches {reached:.0f} on the calibration images"
        if 0 < reached < SMALLEST_NORMAL:
            return f"{which} reaches no more than {reached:.1g} on the calibration images"
    return None


def _badly_rounded(node: ir.Node, opset: int) -> Iterator[str]:
    slots, _ = half_slots(node, opset)
    for index, value in enumerate(node.inputs):
        if value is None or index not in slots or value.dtype != _FLOAT:
            continue
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear" and _loses_scale(producer):
            yield SCALE
        if value.const_value is None or producer is not None:
            continue
        error = rounding_error(value.const_value.numpy())
        if error == float("inf"):
            yield f"its constant {value.name!r} holds values beyond {LARGEST:.0f}"
        elif error > WORST_ROUNDING:
            small = denormals(value.const_value.numpy()) / value.const_value.numpy().size
            yield f"its constant {value.name!r} would be off by {error:.2%} ({small:.0%} of it below FP16's normal range)"


def _loses_scale(node: ir.Node) -> bool:
    """Whether what the node quantizes or dequantizes changes when its scale is rounded to FP16."""
    scale = node.inputs[1]
    if scale is None or scale.const_value is None:
        return True
    exact = scale.const_value.numpy().astype(np.float64)
    rounded = np.maximum(half(exact).astype(np.float64), SMALLEST)
    source = node.inputs[0]
    weight = source.const_value.numpy() if source is not None and source.const_value is not None else np.ones(())
    if exact.ndim and weight.ndim:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
        energy = np.square(weight.astype(np.float64)).sum(axis=others)
    else:
        energy = np.ones(exact.shape)
    lost, size = (energy * np.square(exact - rounded)).sum(), (energy * np.square(exact)).sum()
    return bool(lost > WORST_ROUNDING**2 * size)


def _is_between(node: ir.Node, fp32: Set[ir.Node]) -> bool:
    """Whether a node gets everything from FP32 nodes or the graph's inputs, and gives everything to such or the outputs."""
    sources = [v for v in node.inputs if v is not None and v.dtype == _FLOAT and not v.is_initializer()]
    if not all(v.is_graph_input() or v.producer() in fp32 for v in sources):
        return False
    users = [user for value in node.outputs for user, _ in value.uses()]
    return all(user in fp32 or user.op_type in ("QuantizeLinear", "Shape", "Size") for user in users)


def _origin(value: ir.Value | None) -> str:
    """Return the name of an activation; behind a Q/DQ pair the name of what is quantized."""
    if value is None or value.is_initializer():
        return ""
    node = value.producer()
    while node is not None and node.op_type in PAIR and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value.name or ""


def _copied(graph: ir.Graph, node: ir.Node, readers: list[tuple[ir.Node, int]]) -> ir.Node:
    """Give `readers` a DQ node of their own, and return it."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    copy = ir.node(node.op_type, list(node.inputs), attributes=attributes, name=f"{node.name}_fp32")
    output = copy.outputs[0]
    output.name, output.dtype, output.shape = (
        f"{node.outputs[0].name}_fp32",
        node.outputs[0].dtype,
        node.outputs[0].shape,
    )
    graph.insert_after(node, copy)
    for user, index in readers:
        user.replace_input_with(index, output)
    return copy
