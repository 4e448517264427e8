"""Compute a patch embedding as a Linear layer, which it is: an ONNX file goes in, one that computes the same comes out.

ONNX Runtime's integer convolution writes integers as well, its integer product of matrices writes float. What a patch embedding
puts out is read in float by all that follows, and is far from filling a range: 8 bits of it alone cost a ViT-S/14 more than
all of its Linear layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from rdeploy.graph import simplify
from rdeploy.quantize import qdq
from rdeploy.quantize.placement import is_patch_embedding, weight_of
from rdeploy.quantize.sampling import ints


def rewrite(path: Path, out: Path) -> int:
    """Write the graph at `path` to `out` with its patch embeddings as products of matrices; return how many, 0 writes nothing.

    A layer keeps its name, so that it can be left in float by it.
    """
    model = ir.load(path)
    found = [node for node in model.graph if _cuts_cleanly(node)]
    for node in found:
        _as_product(model.graph, node)
    if found:
        simplify.drop_unused_initializers(model.graph)
        ir.save(model, out)
    return len(found)


def _cuts_cleanly(node: ir.Node) -> bool:
    """Whether a convolution reads every pixel of an image of known size once, in whole patches."""
    weight, source = weight_of(node), node.inputs[0]
    if weight is None or weight.shape is None or source is None or source.shape is None or not is_patch_embedding(node):
        return False
    sides, kernel = list(source.shape)[1:], [int(side) for side in weight.shape][2:]
    return (
        len(kernel) == 2
        and all(isinstance(side, int) for side in sides)
        and sides[0] == weight.shape[1]
        and not any(ints(node, "pads", [0]))
        and set(ints(node, "dilations", [1])) == {1}
        and "auto_pad" not in node.attributes
        and all(int(str(side)) % k == 0 for side, k in zip(sides[1:], kernel))
    )


def _as_product(graph: ir.Graph, node: ir.Node) -> None:
    """(N, C, h k, w l) to (N, h, w, C, k, l) to (N, h w, C k l), times the weights, and back to (N, O, h, w)."""
    source, weight, output = node.inputs[0], weight_of(node), node.outputs[0]
    if source is None or source.shape is None or weight is None or weight.const_value is None:
        return  # asked by `_cuts_cleanly`
    outputs, channels, high, wide = weight.const_value.numpy().shape
    rows, columns = (int(str(side)) // k for side, k in zip(source.shape[2:], (high, wide)))
    name, batch, dtype = node.name or output.name or "patches", source.shape[0], source.dtype
    made: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value | None, shape: tuple[int, ...], **attributes: list[int]) -> ir.Value:
        made.append(ir.node(kind, inputs, attributes, name=f"{name}::{kind}{len(made)}"))
        value = made[-1].outputs[0]
        value.name, value.dtype = made[-1].name, dtype
        value.shape = ir.Shape([batch, *shape])
        return value

    def sizes(*sides: int) -> ir.Value:
        return qdq.constant(graph, f"{name}::sizes{len(made)}", np.array([-1, *sides], np.int64))

    matrix = np.ascontiguousarray(weight.const_value.numpy().reshape(outputs, -1).T)
    cut = (channels, rows, high, columns, wide)
    x = op("Reshape", source, sizes(*cut), shape=cut)
    x = op("Transpose", x, perm=[0, 2, 4, 1, 3, 5], shape=(rows, columns, channels, high, wide))
    x = op("Reshape", x, sizes(rows * columns, len(matrix)), shape=(rows * columns, len(matrix)))
    x = op("MatMul", x, qdq.constant(graph, f"{weight.name}::matrix", matrix), shape=(rows * columns, outputs))
    made[-1].name = name
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        x = op("Add", x, node.inputs[2], shape=(rows * columns, outputs))
    x = op("Transpose", x, perm=[0, 2, 1], shape=(outputs, rows * columns))
    x = op("Reshape", x, sizes(outputs, rows, columns), shape=(outputs, rows, columns))
    graph.insert_before(node, made)
    output.replace_all_uses_with(x)
    graph.remove(node, safe=True)
    x.name = output.name
