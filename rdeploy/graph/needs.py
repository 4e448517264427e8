"""What an ONNX file asks of a runtime that has to build it: operators, forms, precisions, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import defs

from rdeploy.capabilities import Needs, Places
from rdeploy.errors import ConfigError
from rdeploy.graph import cost, opsets

_FLOATS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "fp64",
}
_COORDINATES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")


def read(path: Path) -> Needs:
    """Return what the graph of an ONNX file needs; subgraphs count as the graph itself.

    Raises:
        ConfigError: it is no ONNX file.
    """
    try:
        model = ir.load(path)
    except (DecodeError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not an ONNX model, or is damaged or cut off") from error
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    quantizers = [node for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    summary = cost.summarize(path)
    return Needs(
        opset=opsets.opset_of(model),
        operators=_by_name((node.op_type, _name(node)) for node in nodes),
        forms=_by_name((form, _name(node)) for node in nodes for form, has in _FORMS if has(node)),
        foreign=_by_name((_full_name(node), _name(node)) for node in nodes if _is_foreign(node, model)),
        precisions=_precisions(model.graph, quantizes=bool(quantizers)),
        unsigned=tuple(_name(node) for node in quantizers if _zero_point_type(node) == ir.DataType.UINT8),
        zero_points=tuple(_name(node) for node in quantizers if _is_offset(node)),
        integer_biases=tuple(_name(node) for node in quantizers if _input_type(node) == ir.DataType.INT32),
        dynamic=tuple(value.name or "an input" for value in model.graph.inputs if _has_dynamic_rest(value)),
        weight_bytes=summary.weight_bytes,
        activation_bytes=summary.activation_bytes,
    )


def _name(node: ir.Node) -> str:
    return str(node.name or node.op_type)


def _full_name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _is_foreign(node: ir.Node, model: ir.Model) -> bool:
    """Whether a node's operator is neither ONNX's own nor written out in the file."""
    if node.op_identifier() in model.functions:
        return False
    return node.domain not in ("", "ai.onnx") or not defs.has(node.op_type)


def _by_name(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, Places], ...]:
    found: dict[str, list[str]] = {}
    for key, name in pairs:
        found.setdefault(key, []).append(name)
    return tuple((key, tuple(found[key])) for key in sorted(found))


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return str(attribute.as_string()) if attribute is not None else default


def _antialias(node: ir.Node) -> bool:
    attribute = node.attributes.get("antialias")
    return node.op_type == "Resize" and attribute is not None and bool(attribute.as_int())


def _coordinates(node: ir.Node) -> bool:
    mode = _text(node, "coordinate_transformation_mode", "half_pixel")
    policy = _text(node, "keep_aspect_ratio_policy", "stretch")
    return node.op_type == "Resize" and (mode not in _COORDINATES or policy != "stretch")


def _ellipsis(node: ir.Node) -> bool:
    equation = _text(node, "equation", "").replace(" ", "")
    terms = equation.replace("->", ",").split(",")
    return node.op_type == "Einsum" and ("..." in equation or any(len(set(term)) < len(term) for term in terms))


def _indices(node: ir.Node) -> bool:
    return node.op_type == "MaxPool" and len([value for value in node.outputs if value.name]) > 1


def _dilation(node: ir.Node) -> bool:
    attribute = node.attributes.get("dilations")
    return (
        node.op_type in ("MaxPool", "AveragePool", "LpPool")
        and attribute is not None
        and set(attribute.as_ints()) != {1}
    )


def _reduction(node: ir.Node) -> bool:
    return node.op_type in ("ScatterND", "ScatterElements") and _text(node, "reduction", "none") != "none"


_FORMS: tuple[tuple[str, Callable[[ir.Node], bool]], ...] = (
    ("pool_dilation", _dilation),
    ("pool_indices", _indices),
    ("resize_antialias", _antialias),
    ("resize_coordinates", _coordinates),
    ("einsum_ellipsis", _ellipsis),
    ("scatter_reduction", _reduction),
)


def _precisions(graph: ir.Graph, *, quantizes: bool) -> tuple[str, ...]:
    values = [*graph.initializers.values(), *graph.inputs, *(v for node in graph for v in node.outputs)]
    found = {_FLOATS[value.dtype] for value in values if value.dtype in _FLOATS}
    return tuple(sorted(found | ({"int8"} if quantizes else set())))


def _zero_point_type(node: ir.Node) -> ir.DataType | None:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return value.dtype if value is not None else None


def _input_type(node: ir.Node) -> ir.DataType | None:
    return node.inputs[0].dtype if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None


def _is_offset(node: ir.Node) -> bool:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    constant = value.const_value if value is not None else None
    return constant is not None and bool(np.any(constant.numpy()))


def _has_dynamic_rest(value: ir.Value) -> bool:
    return value.shape is not None and any(not isinstance(size, int) for size in list(value.shape)[1:])
