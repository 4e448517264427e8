"""Move a graph between opsets 17 and 20: up through onnxscript's converter, down by rewriting what each opset changed.

PyTorch's exporter writes opset 18 or, where a user lets it choose, 20. TensorRT 8.x, and with it JetPack 5, takes 17 at most.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rdeploy.errors import Unsupported

EXPORTER_OPSET = 18
LOWEST, HIGHEST = 17, 20
_REDUCTIONS = (
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
_NEW_IN_18 = (
    "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "CenterCropPad", "Col2Im", "GroupNormalization", "Mish",
)  # fmt: skip
_NEW_IN_19 = (
    "DeformConv", "AffineGrid", "ImageDecoder", "RegexFullMatch", "StringConcat", "StringSplit", "DFT", "GridSample",
)  # fmt: skip
"""What opsets 19 and 20 brought or gave another form that 18 cannot express."""
_DEFAULTS_19 = {
    "AveragePool": {"dilations": 1}, "Cast": {"saturate": 1}, "CastLike": {"saturate": 1},
    "QuantizeLinear": {"saturate": 1},
}  # fmt: skip
"""Attributes that opset 19 brought, with the only value that 18 computes."""
_RESIZE_DEFAULTS = {"antialias": 0, "axes": None, "keep_aspect_ratio_policy": "stretch"}


def opset_of(model: ir.Model) -> int:
    """Return the version of ONNX's default operator set that the graph uses."""
    return int(model.graph.opset_imports.get("", EXPORTER_OPSET))


def raise_to_exporter(model: ir.Model) -> None:
    """Bring an older graph to opset 18, in place, where the passes of onnxscript work."""
    if opset_of(model) < EXPORTER_OPSET:
        _convert_with_onnx(model, EXPORTER_OPSET)


def convert(model: ir.Model, opset: int) -> None:
    """Bring a graph of opset 18 or later to `opset`, in place.

    Raises:
        Unsupported: an operator has no form at `opset`, or `opset` is outside 17 to 20.
    """
    if not LOWEST <= opset <= HIGHEST:
        raise Unsupported(f"opset {opset} is outside {LOWEST} to {HIGHEST}; change it in the target profile")
    if opset < opset_of(model) <= HIGHEST and opset_of(model) > EXPORTER_OPSET:
        for node in list(model.graph):
            _lower_to_exporter(model.graph, node)
        model.graph.opset_imports[""] = EXPORTER_OPSET
    current = opset_of(model)
    if current < opset:
        _raise(model, opset)
    elif current == EXPORTER_OPSET and opset == LOWEST:
        for node in list(model.graph):
            _lower(model.graph, node)
        model.graph.opset_imports[""] = LOWEST
    elif current > opset:
        raise Unsupported(f"the graph is opset {current} and the target takes {opset}; export it at {opset}")


def _raise(model: ir.Model, opset: int) -> None:
    from onnxscript import version_converter

    version_converter.convert_version(model, target_version=opset, fallback=True)
    if opset_of(model) != opset:
        raise Unsupported(f"the graph cannot be raised from opset {opset_of(model)} to {opset}")


def _convert_with_onnx(model: ir.Model, opset: int) -> None:
    """ONNX's own converter knows the older opsets; it wants a whole proto, so the graph is taken over from its result."""
    import onnx
    from onnx import version_converter

    before = opset_of(model)
    try:
        proto = version_converter.convert_version(
            onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()), opset
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise Unsupported(f"the graph is opset {before} and cannot be raised to {opset}: {reason}") from error
    model.graph = ir.from_proto(proto).graph


def _lower_to_exporter(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite one node of opset 19 or 20 for opset 18."""
    mode = node.attributes.get("coordinate_transformation_mode" if node.op_type == "Resize" else "mode")
    only_there = (node.op_type == "Resize" and mode is not None and mode.value == "half_pixel_symmetric") or (
        node.op_type == "Pad" and mode is not None and mode.value == "wrap"
    )
    if node.op_type in _NEW_IN_19 or only_there:
        raise Unsupported(
            f"layer {node.name!r} is a {node.op_type} that opset 18 cannot express; the target needs opset 20"
        )
    for name, default in _DEFAULTS_19.get(node.op_type, {}).items():
        value = node.attributes.pop(name, None)
        if value is not None and set(np.ravel(value.value)) != {default}:
            raise Unsupported(f"layer {node.name!r} is a {node.op_type} with {name}, which opset 18 does not have")
    if node.op_type == "Gelu":
        _write_out_gelu(graph, node)


def _write_out_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Write GELU with older operators: x/2 (1 + erf(x / sqrt 2)), or its tanh approximation (Hendrycks and Gimpel 2016)."""
    x, made = node.inputs[0], list[ir.Node]()

    def step(op_type: str, *inputs: ir.Value | float | None) -> ir.Value:
        values = [
            _scalar(graph, f"{node.name}_{len(made)}_{i}", v) if isinstance(v, float) else v
            for i, v in enumerate(inputs)
        ]
        made.append(ir.node(op_type, values, name=f"{node.name}_{op_type.lower()}_{len(made)}"))
        made[-1].outputs[0].dtype, made[-1].outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
        return made[-1].outputs[0]

    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.value == "tanh":
        cubed = step("Mul", step("Mul", x, x), x)
        inner = step("Mul", step("Add", x, step("Mul", cubed, 0.044715)), float(np.sqrt(2 / np.pi)))
        bent = step("Tanh", inner)
    else:
        bent = step("Erf", step("Mul", x, float(np.sqrt(0.5))))
    result = step("Mul", step("Mul", x, 0.5), step("Add", bent, 1.0))
    graph.insert_before(node, made)
    old = node.outputs[0]
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(result, replace_graph_outputs=is_output)
    graph.remove(node, safe=True)
    if is_output:
        result.name = name


def _scalar(graph: ir.Graph, name: str, number: float) -> ir.Value:
    tensor = ir.tensor(np.float32(number), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite one node of opset 18 for opset 17."""
    if node.op_type in _NEW_IN_18:
        raise Unsupported(
            f"layer {node.name!r} is {node.op_type}, which opset 17 does not have; the target needs opset 18"
        )
    if node.op_type in _REDUCTIONS:
        _lower_reduction(node)
    elif node.op_type == "Split":
        _lower_split(node)
    elif node.op_type == "Pad" and len(node.inputs) > 3:
        _lower_pad(graph, node)
    elif node.op_type == "Resize":
        for name, default in _RESIZE_DEFAULTS.items():
            value = node.attributes.pop(name, None)
            if value is not None and value.value != default:
                raise Unsupported(f"layer {node.name!r} resizes with {name}, which opset 17 does not have")


def _lower_reduction(node: ir.Node) -> None:
    """Until opset 18 the axes were an attribute, and no axes always meant all."""
    idle = node.attributes.pop("noop_with_empty_axes", None)
    axes = _constant_input(node, 1, "axes")
    if idle is not None and idle.as_int() and not axes:
        raise Unsupported(f"layer {node.name!r} is a {node.op_type} over no axes, which opset 17 does not have")
    if axes:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    node.resize_inputs(1)


def _lower_split(node: ir.Node) -> None:
    parts, source = node.attributes.pop("num_outputs", None), node.inputs[0]
    if parts is None or source is None or source.shape is None:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    size = source.shape[axis]
    if isinstance(size, int) and size % parts.as_int():
        raise Unsupported(
            f"layer {node.name!r} splits {size} into {parts.as_int()} uneven parts, which opset 17 needs the sizes for"
        )


def _lower_pad(graph: ir.Graph, node: ir.Node) -> None:
    """Until opset 18 every axis was padded: write out the zeros of those that the axes leave out."""
    axes, pads, source = _constant_input(node, 3, "axes"), _constant_input(node, 1, "pads"), node.inputs[0]
    node.resize_inputs(3 if node.inputs[2] is not None else 2)
    if axes is None or pads is None:
        return
    if source is None or source.shape is None:
        raise Unsupported(f"layer {node.name!r} pads a tensor of unknown rank, which opset 17 cannot express")
    rank = len(source.shape)
    full = np.zeros((2, rank), np.int64)
    full[:, [axis % rank for axis in axes]] = np.reshape(pads, (2, -1))
    tensor = ir.tensor(full.reshape(-1), name=f"{node.name}_pads")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    node.replace_input_with(1, value)


def _constant_input(node: ir.Node, index: int, name: str) -> list[int] | None:
    """Return the values of an input that has to be known now; None where the node does not have it."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise Unsupported(f"layer {node.name!r} computes its {name} at run time, which opset 17 cannot express")
    return [int(v) for v in tensor.numpy().reshape(-1)]
