"""Check a quantized graph before anything is built: legal for its scheme, and how much of the work it covers."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from rdeploy.errors import InvariantError
from rdeploy.quantize.placement import weight_of, weighted_nodes
from rdeploy.types import QuantScheme

_PAIR = ("QuantizeLinear", "DequantizeLinear")


def check_legal(path: Path, scheme: QuantScheme) -> None:
    """Check that every Q/DQ pair is one that the scheme's runtimes execute.

    TensorRT's parser refuses asymmetric zero points and INT32 biases, and takes UINT8 silently for INT8; a quantized
    constant must go straight into a DequantizeLinear.

    Raises:
        InvariantError: a pair is not legal; the message names it.
    """
    for node in ir.load(path).graph:
        if node.op_type in _PAIR and (reason := _illegal(node, scheme)):
            raise InvariantError(f"quantize: {node.op_type} {node.name!r} in {path.name} {reason}")


def _illegal(node: ir.Node, scheme: QuantScheme) -> str | None:
    source, zero = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    constant = source is not None and source.is_initializer()
    if zero is None and source is not None and constant and node.op_type == "DequantizeLinear":
        return None if source.dtype == ir.DataType.INT8 else f"holds weights of {source.dtype}, not INT8"
    if zero is None or zero.const_value is None:
        return "has no constant zero point"
    if node.op_type == "QuantizeLinear" and constant:
        return "quantizes a constant at run time"
    found = zero.const_value.dtype
    expected = ir.DataType.INT8 if constant or scheme.activations == "int8" else ir.DataType.UINT8
    if found != expected and not (scheme.integer_attention and found == ir.DataType.INT8):
        return f"is {found}, not {expected}"
    if found == ir.DataType.INT8 and zero.const_value.numpy().any():
        return "has a zero point other than 0"
    return None


def coverage(path: Path) -> float:
    """Return the share of the multiply-accumulates of weighted layers whose weights are INT8."""
    from rdeploy.graph import cost

    graph = ir.load(path).graph
    macs = {layer.name: layer.macs for layer in cost.layers_of(graph)}
    total = quantized = 0
    for node in graph:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        total += macs.get(node.name or "", 0)
        if reads_dequantized_weight(node):
            quantized += macs.get(node.name or "", 0)
    return quantized / total if total else 0.0


def reads_dequantized_weight(node: ir.Node) -> bool:
    """Whether the node's weight comes out of a DequantizeLinear of a constant."""
    producer = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    source = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
    return source is not None and source.is_initializer()


def float_layers(path: Path) -> tuple[str, ...]:
    """Return the names of the weighted layers that stay in float."""
    return tuple(n.name or n.op_type for n in weighted_nodes(ir.load(path).graph) if weight_of(n) is not None)
