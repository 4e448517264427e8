"""Move a graph between opsets 17 and 20: up through onnxscript's converter, down to 17 by rewriting what 18 changed.

The exporter writes opset 18 and above. TensorRT 8.x, and with it JetPack 5, takes 17 at most.
"""

from __future__ import annotations

import onnx_ir as ir

from rdeploy.errors import Unsupported

EXPORTER_OPSET = 18
LOWEST, HIGHEST = 17, 20
_REDUCTIONS = (
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
)  # fmt: skip
_NEW_IN_18 = (
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "BitwiseNot",
    "CenterCropPad",
    "Col2Im",
    "Mish",
    "OptionalHasElement",
)


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
    current = opset_of(model)
    if current < opset:
        _raise(model, opset)
    elif current == EXPORTER_OPSET and opset == LOWEST:
        for node in list(model.graph):
            _lower(node)
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


def _lower(node: ir.Node) -> None:
    """Rewrite one node of opset 18 for opset 17."""
    if node.op_type in _NEW_IN_18:
        raise Unsupported(
            f"layer {node.name!r} is {node.op_type}, which opset 17 does not have; the target needs opset 18"
        )
    if node.op_type in _REDUCTIONS:
        _input_to_attribute(node, 1, "axes")
    elif node.op_type == "Split":
        node.attributes.pop("num_outputs", None)
    elif node.op_type == "Pad" and len(node.inputs) > 3:
        node.resize_inputs(3)
    elif node.op_type == "Resize":
        for name in ("antialias", "axes", "keep_aspect_ratio_policy"):
            value = node.attributes.pop(name, None)
            if name == "antialias" and value is not None and value.as_int():
                raise Unsupported(f"layer {node.name!r} resizes with antialias, which opset 17 does not have")


def _input_to_attribute(node: ir.Node, index: int, name: str) -> None:
    if len(node.inputs) <= index or node.inputs[index] is None:
        return
    tensor = ir.convenience.get_const_tensor(node.inputs[index])
    if tensor is None:
        raise Unsupported(f"layer {node.name!r} computes its {name} at run time, which opset 17 cannot express")
    node.attributes[name] = ir.AttrInt64s(name, [int(v) for v in tensor.numpy().reshape(-1)])
    node.resize_inputs(index)
