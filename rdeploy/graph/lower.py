"""Write an operator that a runtime lacks with operators that it has, in place; the last thing that happens to a graph.

LayerNormalization is nine primitive ones, for TensorRT 8.5. They compute in the type that the operator had: FP16 conversion
leaves LayerNormalization in FP32, since its squares overflow in FP16, and so these stay in FP32 too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from rdeploy.graph import opsets


def lowerable(operators: Collection[str]) -> tuple[str, ...]:
    """Return which of these operators can be written with others."""
    return tuple(name for name in sorted(_REWRITES) if name in operators)


def lower(model: ir.Model, operators: Collection[str]) -> int:
    """Rewrite every node of these operators; return how many there were."""
    found = [node for node in model.graph if node.op_type in operators and node.op_type in _REWRITES]
    for node in found:
        _REWRITES[node.op_type](model, node)
    return len(found)


def _layer_normalization(model: ir.Model, node: ir.Node) -> None:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * scale + bias, over the axes from `axis` on."""
    graph, x = model.graph, node.inputs[0]
    if x is None or x.shape is None or x.dtype is None:
        return  # without its rank the axes are not known; the pre-flight says that the operator is still there
    rank = len(x.shape)
    first = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    axes = list(range(first % rank, rank))
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    steps: list[ir.Node] = []

    def step(op: str, inputs: list[ir.Value], name: str, *, averaged: bool = False) -> ir.Value:
        made = ir.node(op, inputs, name=f"{node.name}_{name}")
        return _typed(steps, made, x, keep=axes if averaged else None)

    def mean(value: ir.Value, name: str) -> ir.Value:
        if opsets.opset_of(model) < 18:
            made = ir.node("ReduceMean", [value], attributes={"axes": axes, "keepdims": 1}, name=f"{node.name}_{name}")
        else:
            over = _constant(graph, f"{node.name}_axes", np.array(axes, np.int64))
            made = ir.node("ReduceMean", [value, over], attributes={"keepdims": 1}, name=f"{node.name}_{name}")
        return _typed(steps, made, x, keep=axes)

    centred = step("Sub", [x, mean(x, "mean")], "centred")
    variance = mean(step("Mul", [centred, centred], "squares"), "variance")
    small = _constant(graph, f"{node.name}_epsilon", np.array(epsilon, x.dtype.numpy()))
    positive = step("Add", [variance, small], "kept_positive", averaged=True)
    deviation = step("Sqrt", [positive], "deviation", averaged=True)
    result = step("Div", [centred, deviation], "normalised")
    for value, op, name in zip(node.inputs[1:3], ("Mul", "Add"), ("scaled", "shifted")):
        if value is not None:
            result = step(op, [result, value], name)
    graph.insert_before(node, steps)
    _stand_in(graph, node, result)


def _typed(steps: list[ir.Node], made: ir.Node, like: ir.Value, keep: list[int] | None = None) -> ir.Value:
    """Append a step whose output has the type and shape of `like`, with 1 along the axes that it averaged over."""
    output = made.outputs[0]
    assert like.shape is not None
    output.name, output.dtype = f"{made.name}_out", like.dtype
    output.shape = ir.Shape([1 if keep and axis in keep else size for axis, size in enumerate(like.shape)])
    steps.append(made)
    return output


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _stand_in(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let `value` take the place and the name of the node's output."""
    old = node.outputs[0]
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(value, replace_graph_outputs=is_output)
    graph.remove(node, safe=True)
    value.name = name


_REWRITES: dict[str, Callable[[ir.Model, ir.Node], None]] = {"LayerNormalization": _layer_normalization}
