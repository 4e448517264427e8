"""Write a graph in FP16 where that is safe: an FP32 graph, plain or with Q/DQ pairs, becomes a strongly typed one, in place.

Weights and activations become float16; the graph's inputs and outputs stay float32. A layer stays FP32 where

- it accumulates or has a large range (normalisation, softmax, means, powers, exponentials, quotients of activations);
- one of its activations came within a factor of 4 of FP16's largest value on the calibration images (`largest`);
- its weights or scales do not survive the rounding: beyond FP16's largest value, or too many below its smallest normal one;
- ONNX has no FP16 form of it.

What lies between FP32 layers alone stays FP32 with them (`fp16_keep`). A cast stands only where a reader needs the other type,
one for all such readers of a tensor. A Q/DQ pair takes the types of what writes and reads it, so that it still touches its
layer: that needs opset 19, in which scales may be FP16. Integer tensors, shapes and the scales of Resize are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from rdeploy.errors import InvariantError, Unsupported
from rdeploy.graph import fp16_keep, opsets, simplify
from rdeploy.results import Float16

QDQ_OPSET = 19
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_BRANCHES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(slots=True)
class _Plan:
    """What stays FP32, and the tensors made on the way: a cast or a rounded constant is made once for all its readers."""

    graph: ir.Graph
    opset: int
    fp32: set[ir.Node]
    names: set[str]
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)
    constants: dict[ir.Value, ir.Value] = field(default_factory=dict)


def convert(model: ir.Model, *, largest: Mapping[str, float] | None = None) -> Float16:
    """Write `model`, in place, in FP16, and in FP32 where that is needed.

    Args:
        largest: the largest absolute value of each activation over the calibration images, by name.

    Raises:
        Unsupported: the graph holds a branch or a loop, or has no form at the opset that Q/DQ pairs in FP16 need.
    """
    graph = _prepared(model)
    opset = opsets.opset_of(model)
    layers = sum(fp16_keep.is_float(node) for node in graph if node.op_type not in fp16_keep.PAIR)
    reasons = fp16_keep.reasons_of(graph, largest or {}, opset=opset)
    fp32 = {*reasons, *fp16_keep.pairs_in_fp32(graph, reasons)}
    plan = _Plan(graph=graph, opset=opset, fp32=fp32, names=_names(graph))
    for node in list(graph):
        _rewrite(plan, node)
    _keep_outputs(plan)
    simplify.drop_unused_initializers(graph)
    graph.sort()
    weights = [v.const_value.numpy() for v in plan.constants if v.const_value is not None]
    return Float16(
        layers=layers,
        kept=tuple((node.name or node.op_type, why) for node, why in reasons.items() if fp16_keep.is_float(node)),
        casts=len(plan.casts),
        weights=sum(w.size for w in weights),
        denormals=sum(fp16_keep.denormals(w) for w in weights),
    )


def check_typed(model: ir.Model) -> None:
    """Check that a converted graph is strongly typed: float32 at its ends, one float type around each node, no idle cast.

    Raises:
        InvariantError: it is not; the message names the node.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == _HALF:
            raise InvariantError(f"fp16: {value.name!r} is FP16, but inputs and outputs stay FP32")
    opset = opsets.opset_of(model)
    for node in model.graph:
        slots, _ = fp16_keep.half_slots(node, opset)
        types = {v.dtype for i, v in enumerate(node.inputs) if i in slots and v is not None} & {_FLOAT, _HALF}
        if len(types) > 1 and node.op_type not in fp16_keep.ANY_INPUT:
            raise InvariantError(f"fp16: layer {node.name!r} ({node.op_type}) reads FP32 and FP16")
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is not None and source.dtype == node.outputs[0].dtype:
            raise InvariantError(f"fp16: cast {node.name!r} changes nothing")


def _prepared(model: ir.Model) -> ir.Graph:
    """Check that the graph has a form in FP16, and bring it to the opset and the order that the rest relies on."""
    for node in model.graph:
        if any(attribute.type in _BRANCHES for attribute in node.attributes.values()):
            raise Unsupported(
                f"layer {node.name!r} is {node.op_type}, a branch or a loop, which has no FP16 form here", stage="fp16"
            )
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph)
    if quantized and opsets.opset_of(model) < QDQ_OPSET:
        opsets.convert(model, QDQ_OPSET)
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        passes.ShapeInferencePass()(model)
    model.graph.sort()
    return model.graph


def _rewrite(plan: _Plan, node: ir.Node) -> None:
    """Give a node inputs of its type, and its outputs that type."""
    if node.op_type in ("Shape", "Size"):
        return
    inputs, outputs = fp16_keep.half_slots(node, plan.opset)
    halved = node not in plan.fp32
    if node.op_type == "Cast":
        if halved and node.outputs[0].dtype == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
            node.outputs[0].dtype = _HALF
        return
    for index, value in enumerate(node.inputs):
        wanted = _HALF if halved and index in inputs else _FLOAT
        if value is not None and value.dtype in (_FLOAT, _HALF) and value.dtype != wanted:
            node.replace_input_with(index, _as_type(plan, value, wanted))
    if halved:
        for index in outputs:
            if node.outputs[index].dtype == _FLOAT:
                node.outputs[index].dtype = _HALF


def _as_type(plan: _Plan, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    """Return a value in the other type: a constant rounded now, an activation through its cast."""
    if value.is_initializer():
        if value not in plan.constants:
            plan.constants[value] = _rounded(plan, value)
        return plan.constants[value]
    if (value, wanted) not in plan.casts:
        plan.casts[value, wanted] = _cast(plan, value, wanted)
    return plan.casts[value, wanted]


def _rounded(plan: _Plan, value: ir.Value) -> ir.Value:
    exact = value.const_value.numpy() if value.const_value is not None else np.zeros(())
    array = fp16_keep.half(exact)
    if any(user.op_type in fp16_keep.PAIR and index == 1 for user, index in value.uses()):
        array = np.maximum(array, np.float16(fp16_keep.SMALLEST))  # a scale divides: it must not become 0
    tensor = ir.tensor(array, name=_fresh(plan, f"{value.name}_fp16"))
    made = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(_HALF), const_value=tensor)
    plan.graph.register_initializer(made)
    return made


def _cast(plan: _Plan, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    name = _fresh(plan, f"{value.name}_{'fp16' if wanted == _HALF else 'fp32'}")
    node = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=f"cast_{name}")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, wanted, value.shape
    producer = value.producer()
    if producer is None:
        plan.graph.insert_before(plan.graph[0], node)
    else:
        plan.graph.insert_after(producer, node)
    return output


def _keep_outputs(plan: _Plan) -> None:
    """Leave the graph's outputs float32 and under their names."""
    for index, value in enumerate(plan.graph.outputs):
        if value.dtype != _HALF:
            continue
        name = value.name
        cast = _as_type(plan, value, _FLOAT)
        plan.graph.outputs[index] = cast
        value.name = _fresh(plan, f"{name}_inner")
        cast.name = name


def _names(graph: ir.Graph) -> set[str]:
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return {value.name or "" for value in values}


def _fresh(plan: _Plan, name: str) -> str:
    while name in plan.names:
        name += "_"
    plan.names.add(name)
    return name
