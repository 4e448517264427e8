"""Bring any FP32 ONNX graph into the form the rest of rdeploy works on: an ir.Model goes in and is rewritten in place.

Afterwards: input sizes are bound, constants are folded, BatchNorm is part of its convolution, LayerNormalization is one
operator, spatial means are GlobalAveragePool, Linear layers are MatMul and Add, dead code is gone.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from rdeploy.errors import Unsupported

log = logging.getLogger(__name__)

FOLD_LIMIT_BYTES = 64 << 20
"""Constants larger than this are not folded: a folded table may be far larger than what computes it."""


def simplify(model: ir.Model, *, opset: int, input_shape: Sequence[int | str] | None = None) -> None:
    """Simplify `model`, in place, and bring it to `opset` (17 to 20). `input_shape` binds the single input's shape.

    Raises:
        Unsupported: the graph cannot be expressed at this opset; the message names the operator.
    """
    from rdeploy.graph import opsets

    if input_shape is not None:
        _bind(model.graph, input_shape)
    _name_nodes(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    opsets.raise_to_exporter(model)
    _fold(model)
    _lift_batch_norm(model.graph)
    _rewrite(model)
    _use_global_average_pool(model.graph)
    _use_matmul(model.graph)
    _drop_idle_pads(model.graph)
    _use_small_letters(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    passes.RemoveUnusedNodesPass()(model)
    opsets.convert(model, opset)
    drop_unused_initializers(model.graph)
    _name_nodes(model.graph)
    passes.ShapeInferencePass()(model)
    model.graph.sort()


def _drop_idle_pads(graph: ir.Graph) -> None:
    """Remove every Pad that adds nothing: a window attention pads its tokens to whole windows, most of which are."""
    for node in list(graph):
        if node.op_type != "Pad" or node.inputs[0] is None or node.inputs[0].is_graph_input():
            continue
        pads = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if pads is not None and not pads.numpy().any():
            _replace(graph, node, node.inputs[0])


def _use_small_letters(graph: ir.Graph) -> None:
    """Write the axes of an Einsum in small letters, each apart: TensorRT's parser refuses capitals, which ONNX allows."""
    for node in graph:
        if node.op_type != "Einsum":
            continue
        equation = node.attributes["equation"].as_string().replace(" ", "")
        letters = dict.fromkeys(one for one in equation if one.isalpha())
        free = [one for one in string.ascii_lowercase if one not in letters]
        capitals = [one for one in letters if one.isupper()]
        if capitals and len(capitals) <= len(free):
            small = equation.translate(str.maketrans(dict(zip(capitals, free))))
            node.attributes["equation"] = ir.AttrString("equation", small)


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove the constants that nothing reads any more: a folded weight would be in the file twice."""
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        graph.initializers.pop(name)


def _fold(model: ir.Model) -> None:
    """Fold constants until nothing more folds: a folded shape makes the next shape known."""
    import onnxscript.optimizer

    before = -1
    while before != (before := len(list(model.graph))):
        passes.ShapeInferencePass()(model)
        onnxscript.optimizer.optimize(model, output_size_limit=FOLD_LIMIT_BYTES, input_size_limit=FOLD_LIMIT_BYTES)


def _bind(graph: ir.Graph, shape: Sequence[int | str]) -> None:
    """Give the input its shape, and forget what was inferred from the old one."""
    graph.inputs[0].shape = ir.Shape(list(shape))
    for node in graph:
        for value in node.outputs:
            value.shape = None


def _lift_batch_norm(graph: ir.Graph) -> None:
    """Move a BatchNorm before the resampling that it follows, where a convolution can absorb it.

    Averages whose weights sum to 1 and a scale and shift per channel may change places: that is every interpolation and
    every average pooling that counts no padding.
    """
    for node in [n for n in graph if n.op_type == "BatchNormalization" and len(n.outputs) == 1]:
        while (before := node.inputs[0].producer() if node.inputs[0] else None) is not None:
            if not _averages(before) or len(list(before.outputs[0].uses())) != 1 or before.outputs[0].is_graph_output():
                break
            source, normalised = before.inputs[0], node.outputs[0]
            normalised.replace_all_uses_with(before.outputs[0], replace_graph_outputs=normalised.is_graph_output())
            normalised.shape = source.shape if source is not None else None
            node.replace_input_with(0, source)
            before.replace_input_with(0, normalised)
            graph.remove(node)
            graph.insert_before(before, node)


def _averages(node: ir.Node) -> bool:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Resize":
        return attributes.get("coordinate_transformation_mode") != "tf_crop_and_resize" and not attributes.get(
            "exclude_outside", 0
        )
    return node.op_type == "AveragePool" and (
        not any(attributes.get("pads", ())) or not attributes.get("count_include_pad", 0)
    )


def _rewrite(model: ir.Model) -> None:
    from onnxscript import rewriter
    from onnxscript.rewriter.rules import common
    from onnxscript.rewriter.rules.fusion import _layer_norm

    for node in model.graph:  # the patterns name attributes that older exporters leave at their default
        if node.op_type == "ReduceMean" and "keepdims" not in node.attributes:
            node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
    _layer_norm.fuse_layer_normalization(model)
    rewriter.rewrite(model, pattern_rewrite_rules=_rules(common))


def _rules(common: Any) -> list[Any]:
    """BatchNorm into convolutions and Pad into Conv; whatever of these the installed onnxscript has."""
    wanted = (
        "fuse_batchnorm_into_conv_rule",
        "fuse_batchnorm_into_conv_transpose_rule",
        "fuse_batchnorm_into_gemm_rule",
        "normalize_pad_format_conv_rule",
        "fuse_pad_into_conv_rule",
    )
    return [getattr(common, name) for name in wanted if hasattr(common, name)]


def _use_global_average_pool(graph: ir.Graph) -> None:
    """Write a mean over both spatial axes as GlobalAveragePool, which the runtimes have an INT8 kernel for."""
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "ReduceMean" or source is None or source.shape is None or len(source.shape) != 4:
            continue
        axes = _axes(node)
        if axes is None or sorted(a % 4 for a in axes) != [2, 3]:
            continue
        keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        pooled = ir.node("GlobalAveragePool", [source], name=f"{node.name}_pool")
        pooled.outputs[0].dtype = source.dtype
        pooled.outputs[0].shape = ir.Shape([*list(source.shape)[:2], 1, 1])
        graph.insert_before(node, pooled)
        result = pooled.outputs[0]
        if not keep:
            flat = ir.node("Flatten", [result], attributes={"axis": 1}, name=f"{node.name}_flatten")
            flat.outputs[0].dtype, flat.outputs[0].shape = source.dtype, node.outputs[0].shape
            graph.insert_before(node, flat)
            result = flat.outputs[0]
        _replace(graph, node, result)


def _use_matmul(graph: ir.Graph) -> None:
    """Write Gemm with constant weights as MatMul and Add, as every other Linear layer is.

    ONNX Runtime has no integer kernel for Gemm with a float bias: it would dequantize the weights on every run.
    """
    for node in list(graph):
        weight = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "Gemm" and node.inputs[1] else None
        numbers = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = numbers.get("alpha", 1.0) == numbers.get("beta", 1.0) == 1.0 and not numbers.get("transA", 0)
        if weight is None or not plain:
            continue
        columns = _transposed(graph, node.inputs[1]) if numbers.get("transB", 0) else node.inputs[1]
        product = ir.node("MatMul", [node.inputs[0], columns], name=f"{node.name}_matmul")
        made = [product]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
        for step in made:
            step.outputs[0].dtype, step.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
        graph.insert_before(node, made)
        _replace(graph, node, made[-1].outputs[0])


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """Return a constant matrix with its axes exchanged: one for all the nodes that read it so."""
    name = f"{weight.name}_columns"
    if name not in graph.initializers:
        constant = ir.convenience.get_const_tensor(weight)
        tensor = ir.tensor(np.ascontiguousarray(constant.numpy().T), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    value = node.inputs[1] if len(node.inputs) > 1 else None
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else [int(a) for a in np.atleast_1d(constant.numpy())]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for the node's output, keeping the graph output's name, and remove the node."""
    old = node.outputs[0]
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(value, replace_graph_outputs=is_output)
    graph.remove(node, safe=True)
    if is_output:
        value.name = name


def _name_nodes(graph: ir.Graph) -> None:
    """Give every node a name that is its own: layers are referred to by it in reports and in logs."""
    seen: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        while name in seen:
            name = f"{name}_{index}"
        node.name = name
        seen.add(name)


def check_operators(model: ir.Model) -> None:
    """Refuse what no target runtime takes: operators outside ONNX's own domain.

    Raises:
        Unsupported: a node is of a custom domain; the message names it.
    """
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            raise Unsupported(
                f"layer {node.name or node.op_type!r} is {node.domain}::{node.op_type}, which is outside ONNX's operators; "
                "export the model without custom operators"
            )
