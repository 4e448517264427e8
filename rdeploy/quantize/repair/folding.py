"""Fold a factor or a shift per channel into the layers around a group of tensors: exact in float, in place."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.graph import simplify
from rdeploy.quantize import qdq
from rdeploy.quantize.channels import Group
from rdeploy.quantize.placement import is_constant, weight_of

Floats = NDArray[np.float64]


def scale(graph: ir.Graph, group: Group, factors: Floats) -> None:
    """Multiply every tensor of the group by `factors`: what writes them takes them in, what reads them takes them out."""
    for node in group.writers:
        _scale_outputs(graph, node, factors)
    for node, index in group.biases:
        value = node.inputs[index]
        source = node.inputs[1 - index]
        rank = len(source.shape) if source is not None and source.shape is not None else 1
        (axis,) = group.tensors[(source.name or "") if source is not None else ""]
        _replace(graph, node, index, _array(value) * _along(factors, axis, rank))
    for node in group.readers:
        weight = _array(node.inputs[1])
        _replace(graph, node, 1, weight / _input_shape(node, weight, factors))
    simplify.drop_unused_initializers(graph)


def scale_outputs(graph: ir.Graph, node: ir.Node, biases: Iterable[tuple[ir.Node, int]], factors: Floats) -> None:
    """Multiply what a layer writes by `factors`; `biases` are the Adds behind it with the places of their constants."""
    _scale_outputs(graph, node, factors)
    for add, index in biases:
        _replace(graph, add, index, _array(add.inputs[index]) * factors)
    simplify.drop_unused_initializers(graph)


def _scale_outputs(graph: ir.Graph, node: ir.Node, factors: Floats) -> None:
    weight = _array(node.inputs[1])
    if node.op_type == "Conv":
        _replace(graph, node, 1, weight * _along(factors, 0, weight.ndim))
    else:  # MatMul (K, N), the scale of a LayerNormalization, or a Mul that smooths
        _replace(graph, node, 1, weight * factors)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _replace(graph, node, 2, _array(node.inputs[2]) * factors)


def _input_shape(node: ir.Node, weight: Floats, factors: Floats) -> Floats:
    """Return `factors` shaped to the input channels of a weight."""
    if node.op_type == "MatMul":
        return factors[:, None]
    groups = factors.size // weight.shape[1]
    per_group = factors.reshape(groups, 1, weight.shape[1]).repeat(weight.shape[0] // groups, axis=1)
    return np.asarray(per_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))


def can_shift(group: Group) -> bool:
    """Whether a LayerNormalization (or a smoothing Mul behind its Add) writes the group and Linear layers with a bias read it."""
    return all(node.op_type in ("LayerNormalization", "Mul") for node in group.writers) and all(
        node.op_type == "MatMul" and bias_of(node) is not None for node in group.readers
    )


def shift(graph: ir.Graph, group: Group, by: Floats) -> None:
    """Subtract `by` from every channel of the group, and give it back through the biases of the layers that read it."""
    for node in group.writers:
        if node.op_type == "Mul":
            add = node.inputs[0].producer() if node.inputs[0] is not None else None
            if add is not None:
                _replace(graph, add, 1, _array(add.inputs[1]) - by / _array(node.inputs[1]))
            continue
        old = _array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(by.size)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        _replace(graph, node, 2, old - by)
    for node in group.readers:
        holder = bias_of(node)
        if holder is not None:
            add, index = holder
            bias = _array(add.inputs[index])
            _replace(graph, add, index, bias + (by @ _array(node.inputs[1])).reshape(bias.shape))
    simplify.drop_unused_initializers(graph)


def bias_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the Add that holds a MatMul's bias and which of its inputs that is; None where nothing of the kind follows."""
    users = list(node.outputs[0].uses())
    weight = weight_of(node)
    if len(users) != 1 or users[0][0].op_type != "Add" or weight is None or weight.shape is None:
        return None
    add, index = users[0][0], 1 - users[0][1]
    constant = add.inputs[index]
    if not is_constant(constant) or constant is None or constant.const_value is None:
        return None
    return (add, index) if constant.const_value.size == weight.shape[-1] else None


def _array(value: ir.Value | None) -> Floats:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return np.zeros(0) if tensor is None else np.asarray(tensor.numpy(), np.float64)


def _along(factors: Floats, axis: int, rank: int) -> Floats:
    return factors.reshape([-1 if i == axis else 1 for i in range(rank)])


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Floats) -> None:
    """Let the node read a new constant; another reader of the old one keeps it."""
    old = node.inputs[index] if len(node.inputs) > index else None
    base = ((old.name if old is not None else None) or f"{node.name}_bias").partition("::scaled")[0]
    number = 0
    while (name := f"{base}::scaled{number}") in graph.initializers:
        number += 1
    tensor = old.const_value if old is not None else node.inputs[1].const_value if node.inputs[1] is not None else None
    dtype = tensor.numpy().dtype if tensor is not None else np.float32
    node.replace_input_with(index, qdq.constant(graph, name, array.astype(dtype)))
