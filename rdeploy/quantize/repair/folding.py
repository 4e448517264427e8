"""Fold a factor or a shift per channel into the layers around a group of tensors: exact in float, in place."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.graph import simplify
from rdeploy.quantize import qdq
from rdeploy.quantize.channels import Group

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
        replace(graph, node, index, array(value) * _along(factors, axis, rank))
    for node in group.readers:
        weight = array(node.inputs[1])
        replace(graph, node, 1, weight / _input_shape(node, weight, factors))
    simplify.drop_unused_initializers(graph)


def scale_outputs(graph: ir.Graph, node: ir.Node, biases: Iterable[tuple[ir.Node, int]], factors: Floats) -> None:
    """Multiply what a layer writes by `factors`; `biases` are the Adds behind it with the places of their constants."""
    _scale_outputs(graph, node, factors)
    for add, index in biases:
        replace(graph, add, index, array(add.inputs[index]) * factors)
    simplify.drop_unused_initializers(graph)


def _scale_outputs(graph: ir.Graph, node: ir.Node, factors: Floats) -> None:
    weight = array(node.inputs[1])
    if node.op_type == "Conv":
        replace(graph, node, 1, weight * _along(factors, 0, weight.ndim))
    else:  # MatMul (K, N), the scale of a LayerNormalization, or a Mul that smooths
        replace(graph, node, 1, weight * factors)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        replace(graph, node, 2, array(node.inputs[2]) * factors)


def _input_shape(node: ir.Node, weight: Floats, factors: Floats) -> Floats:
    """Return `factors` shaped to the input channels of a weight."""
    if node.op_type == "MatMul":
        return factors[:, None]
    groups = factors.size // weight.shape[1]
    per_group = factors.reshape(groups, 1, weight.shape[1]).repeat(weight.shape[0] // groups, axis=1)
    return np.asarray(per_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))


def array(value: ir.Value | None) -> Floats:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return np.zeros(0) if tensor is None else np.asarray(tensor.numpy(), np.float64)


def _along(factors: Floats, axis: int, rank: int) -> Floats:
    return factors.reshape([-1 if i == axis else 1 for i in range(rank)])


def replace(graph: ir.Graph, node: ir.Node, index: int, array: Floats) -> None:
    """Let the node read a new constant; another reader of the old one keeps it."""
    old = node.inputs[index] if len(node.inputs) > index else None
    base = ((old.name if old is not None else None) or f"{node.name}_bias").partition("::scaled")[0]
    number = 0
    while (name := f"{base}::scaled{number}") in graph.initializers:
        number += 1
    tensor = old.const_value if old is not None else node.inputs[1].const_value if node.inputs[1] is not None else None
    dtype = tensor.numpy().dtype if tensor is not None else np.float32
    node.replace_input_with(index, qdq.constant(graph, name, array.astype(dtype)))
