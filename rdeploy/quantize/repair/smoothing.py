"""Smoothing: give what a Linear layer reads an Add and a Mul of its own, where nothing before it can take a channel's scale.

Behind a GELU no earlier layer can scale or move a channel, and its outputs, a long tail above a floor of -0.17, waste half of a
symmetric range. With x' = (x + a) s per channel, s taken out of the layer's weights and a given back through its bias, the
network stays the same in FP32 (SmoothQuant, Xiao et al., ICML 2023; with a shift: MPTQ-ViT, and the GELU shift of FQ-ViT's
followers). It costs two element-wise operators at run time, which runtimes fuse into what comes before: a pair that gains
little is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize import qdq
from rdeploy.quantize.channels import SMOOTHED, groups
from rdeploy.quantize.placement import place, weight_of
from rdeploy.quantize.repair import bias_correction, equalization
from rdeploy.types import QuantScheme


def smooth(path: Path, out: Path, schemes: Sequence[QuantScheme], batches: Sequence[NDArray[np.float32]]) -> int:
    """Write the graph at `path`, equalized and smoothed for all `schemes`, to `out`; return how many tensors were smoothed."""
    model = ir.load(path)
    if not insert(model, schemes):
        return 0
    ir.save(model, out)
    if not equalization.equalize(out, out, schemes, batches):
        return 0
    model = ir.load(out)
    kept = prune(model.graph)
    ir.save(model, out)
    return kept


def insert(model: ir.Model, schemes: Sequence[QuantScheme]) -> int:
    """Put a neutral Add and Mul in front of the Linear layers that no earlier layer can be equalized with; return how many.

    `equalization.apply` then finds their factors and shifts, and `prune` takes out what stayed neutral.
    """
    scalable = {name for group in groups(model.graph) for name in group.tensors}
    readers: dict[str, list[ir.Node]] = {}
    for scheme in schemes:
        for name, reads in place(model, scheme).reads.items():
            readers.setdefault(name, []).extend(node for node, index in reads if index == 0)
    inserted = 0
    for name, nodes in readers.items():
        value = nodes[0].inputs[0] if nodes else None  # there is none where it only is a second factor
        if name in scalable or value is None or not all(_can_absorb(node) for node in nodes):
            continue
        if len({id(node) for node in nodes}) < len(list(value.uses())):
            continue  # read elsewhere as well: the pair would not take the place of the tensor
        _insert(model.graph, value, list(dict.fromkeys(nodes)))
        inserted += 1
    return inserted


def _can_absorb(node: ir.Node) -> bool:
    weight = weight_of(node)
    return (
        node.op_type == "MatMul"
        and weight is not None
        and weight.shape is not None
        and len(weight.shape) == 2
        and len(list(weight.uses())) == 1
        and bias_correction.holder(node) is not None
    )


def _insert(graph: ir.Graph, value: ir.Value, readers: Sequence[ir.Node]) -> None:
    weight = weight_of(readers[0])
    channels = int(weight.shape[0]) if weight is not None and weight.shape is not None else 0
    ends = {"add": np.zeros(channels, np.float32), "mul": np.ones(channels, np.float32)}
    constants = {kind: qdq.constant(graph, f"{value.name}::{kind}", array) for kind, array in ends.items()}
    add = ir.node("Add", [value, constants["add"]], name=f"{value.name}::moved")
    mul = ir.node("Mul", [add.outputs[0], constants["mul"]], name=f"{value.name}{SMOOTHED}")
    for node in (add, mul):
        node.outputs[0].name = node.name
        node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [add, mul])
    else:
        graph.insert_after(producer, [add, mul])
    for node in readers:
        node.replace_input_with(0, mul.outputs[0])


def prune(graph: ir.Graph) -> int:
    """Take out every Add of zeros and Mul by ones that smoothing left neutral; return how many tensors stay smoothed."""
    kept = 0
    for mul in [node for node in graph if node.op_type == "Mul" and (node.name or "").endswith(SMOOTHED)]:
        add = mul.inputs[0].producer() if mul.inputs[0] is not None else None
        moved = add is not None and _bypass(graph, add, neutral=0.0)
        kept += _bypass(graph, mul, neutral=1.0) or moved
    return kept


def _bypass(graph: ir.Graph, node: ir.Node, *, neutral: float) -> bool:
    """Remove a node whose constant is neutral; return whether it stays."""
    tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if tensor is None or np.any(tensor.numpy() != neutral) or node.inputs[0] is None:
        return True
    node.outputs[0].replace_all_uses_with(node.inputs[0])
    graph.remove(node, safe=True)
    return False
