"""Re-size a graph that was exported for one image size: a simplified ir.Model goes in and is rewritten in place.

The graph is walked in order with the old shapes, which it knows, and the new ones, which follow. Constants that froze a spatial
size are written anew: the targets of Reshape, Resize and Expand, the ends of a Slice, the kernel of a pooling over the whole
map, "SAME" padding that was computed from the size. A frozen size that equals that of a map met before follows that map
(which is how skip connections and outputs at the image's size stay aligned), any other keeps its ratio. What is tied to the
size by weights (a Linear layer behind a flatten, a position embedding) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rdeploy.errors import Unsupported
from rdeploy.graph import _parts, simplify
from rdeploy.graph._walk import Dim, Shape, Walk, ints, set_constant, shape_of, text
from rdeploy.types import Size, format_size

_SMALL = 4096
_ADAPTIVE_KERNEL = 5
"""A pooling without overlap over so many pixels or more was an adaptive one, whose number of bins was meant."""


def resize(model: ir.Model, resolution: Size) -> None:
    """Rewrite a graph with known shapes for images of `resolution` (h, w), in place.

    Raises:
        Unsupported: a layer is tied to the old size; the message names it.
    """
    graph = model.graph
    image = graph.inputs[0]
    walk = Walk(graph=graph, resolution=resolution)
    shape = shape_of(image)
    walk.old[image], walk.new[image] = shape, (*shape[:2], *resolution)
    walk.follows = {(axis, shape[axis]): walk.new[image][axis] for axis in (2, 3)}
    walk.same_padding = any(_asymmetric_same(node) for node in graph)
    opset = int(graph.opset_imports.get("", 18))
    for node in list(graph):
        if any(value in walk.new for value in node.inputs):
            # A map may keep its size (64 and 48 are both 2 pixels at stride 32) and what is enlarged from it may not.
            _REWRITES.get(node.op_type, _leave)(walk, node)
            _check_constants(walk, node)
            _infer(walk, node, opset)
    simplify.drop_unused_initializers(graph)
    for value in graph.outputs:
        if value in walk.new and len(walk.new[value]) == 2 and walk.new[value][1] != walk.old[value][1]:
            raise Unsupported(
                f"at {format_size(resolution)} its output is {walk.new[value][1]} numbers instead of {walk.old[value][1]}: "
                "it flattens the feature map without pooling"
            )
    for value, found in walk.new.items():
        value.shape = ir.Shape(list(found))


def _leave(walk: Walk, node: ir.Node) -> None:
    """Nothing in this operator froze a size."""


def _reshape(walk: Walk, node: ir.Node) -> None:
    source, target = node.inputs[0], ints(node.inputs[1])
    if source is None or target is None:
        return
    old, wanted = walk.old[source], shape_of(node.outputs[0])
    fitted = _regrouped(walk, old, walk.new[source], wanted) or _parts.unshuffled(node, walk.new[source], wanted)
    if fitted is None:
        said = f"{text(old)} into {text(wanted)}"
        raise Unsupported(f"layer {node.name!r} splits {said}: windows or patches that fit the old size only")
    kept = [asked if asked <= 0 or isinstance(size, str) else size for asked, size in zip(target, fitted)]
    if list(kept) != target:
        set_constant(walk.graph, node, 1, [int(size) for size in kept])


def _regrouped(walk: Walk, old: Shape, new: Shape, target: Shape) -> Shape | None:
    """Return what a reshape's target becomes: its dimensions are matched with the source's by equal products."""
    result: list[Dim] = []
    i = j = 0
    while i < len(old) and j < len(target):
        first, second = i, j
        while _product(old[first : i + 1]) != _product(target[second : j + 1]):
            if _product(old[first : i + 1]) < _product(target[second : j + 1]):
                i += 1
            else:
                j += 1
            if i >= len(old) or j >= len(target):
                return None
        part = _regrouped_part(walk, old[first : i + 1], new[first : i + 1], target[second : j + 1])
        if part is None:
            return None
        result += part
        i, j = i + 1, j + 1
    rest = (*old[i:], *target[j:])
    return (*result, *target[j:]) if all(size == 1 for size in rest) else None


def _regrouped_part(walk: Walk, old: Shape, new: Shape, target: Shape) -> list[Dim] | None:
    if old == new:
        return list(target)
    if len(target) == 1:
        return [int(_product(new))] if len(new) > 1 else [new[0]]
    large = [index for index, size in enumerate(target) if size != 1]
    if len(large) == 1:
        return [int(_product(new)) if index == large[0] else size for index, size in enumerate(target)]
    if len(old) != 1 or len(large) != 2:
        return None
    grid = {index: walk.follows.get((axis, target[index])) for axis, index in zip((2, 3), large)}
    if None in grid.values() or _product(tuple(size for size in grid.values() if size)) != _product(new):
        return None
    return [grid.get(index) or size for index, size in enumerate(target)]


def _product(shape: Shape) -> int:
    """Return the number of elements, with an unknown batch as one."""
    return int(np.prod([size for size in shape if isinstance(size, int)], dtype=np.int64))


def _resize(walk: Walk, node: ir.Node) -> None:
    source = node.inputs[0]
    if source is None or len(shape_of(source)) != 4:
        return
    old, new, output = walk.old[source], walk.new[source], shape_of(node.outputs[0])
    frozen = ints(node.inputs[3]) if len(node.inputs) > 3 else None
    if frozen is None:
        image = walk.graph.inputs[0]
        if output[2:] != walk.old[image][2:] or old[2:] == output[2:]:
            return  # a factor; but a map that was enlarged to the image's size stays at the image's size
    sizes = [walk.followed(axis, output[axis], (old[axis], new[axis])) for axis in (2, 3)]
    axes = [a % 4 for a in node.attributes["axes"].as_ints()] if "axes" in node.attributes else [0, 1, 2, 3]
    full = [1 if isinstance(output[0], str) else output[0], output[1], *sizes]
    if frozen is None and 0 in axes and isinstance(output[0], str):
        node.attributes["axes"] = ir.AttrInt64s("axes", [2, 3])
        axes = [2, 3]
    while len(node.inputs) < 4:
        node.resize_inputs(len(node.inputs) + 1)
    node.replace_input_with(2, None)
    set_constant(walk.graph, node, 3, [int(full[axis]) for axis in axes])


def _expand(walk: Walk, node: ir.Node) -> None:
    source, target = node.inputs[0], ints(node.inputs[1])
    output = shape_of(node.outputs[0])
    if source is None or target is None or len(output) != 4 or len(target) != 4:
        return
    set_constant(walk.graph, node, 1, _expanded(walk, target, output, source))


def _expanded(walk: Walk, target: Sequence[int], output: Shape, source: ir.Value) -> list[int]:
    sizes = list(target)
    for axis in (2, 3):
        if isinstance(output[axis], int) and output[axis] != 1 and target[axis] != 1:
            own = walk.new.get(source, output)
            known = own[axis] if len(own) == 4 and own[axis] != 1 else walk.followed(axis, output[axis], (1, 1))
            sizes[axis] = int(known)
    return sizes


def _pool(walk: Walk, node: ir.Node) -> None:
    """A pooling over the whole map stays one, and one that makes a fixed number of bins keeps their number."""
    source = node.inputs[0]
    if source is None:
        return
    kernel = tuple(node.attributes["kernel_shape"].as_ints())
    strides = tuple(node.attributes["strides"].as_ints()) if "strides" in node.attributes else (1, 1)
    padded = "pads" in node.attributes and any(node.attributes["pads"].as_ints())
    old, new, bins = walk.old[source][2:], walk.new[source][2:], shape_of(node.outputs[0])[2:]
    if kernel == old and not padded:
        kernel = tuple(int(size) for size in new)
    elif kernel == strides and not padded and max(kernel) >= _ADAPTIVE_KERNEL:
        if any(int(size) % int(count) for size, count in zip(new, bins)):
            raise Unsupported(
                f"layer {node.name!r} pools a map into {text(bins)} parts, which do not divide {text(new)}"
            )
        kernel = strides = tuple(int(size) // int(count) for size, count in zip(new, bins))
    else:
        _same_padding(walk, node)
        return
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)
    node.attributes["strides"] = ir.AttrInt64s("strides", strides)


def _same_padding(walk: Walk, node: ir.Node) -> None:
    """Padding that TensorFlow's SAME rule computed from the size is computed again, where the graph has such padding."""
    source = node.inputs[0]
    if not walk.same_padding or source is None or not _is_same(node, walk.old[source]):
        return
    node.attributes["pads"] = ir.AttrInt64s("pads", _same(node, walk.new[source]))


def _asymmetric_same(node: ir.Node) -> bool:
    if node.op_type != "Conv" or "pads" not in node.attributes or node.inputs[0] is None:
        return False
    pads = list(node.attributes["pads"].as_ints())
    half = len(pads) // 2
    return pads[:half] != pads[half:] and _is_same(node, shape_of(node.inputs[0]))


def _is_same(node: ir.Node, shape: Shape) -> bool:
    known = len(shape) == 4 and all(isinstance(size, int) for size in shape[2:])
    return known and "pads" in node.attributes and list(node.attributes["pads"].as_ints()) == _same(node, shape)


def _same(node: ir.Node, shape: Shape) -> list[int]:
    """Return ONNX pads (begins, then ends) by the SAME_UPPER rule."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if "kernel_shape" in node.attributes:
        kernel = list(node.attributes["kernel_shape"].as_ints())
    else:
        kernel = [int(size) for size in shape_of(weight)[2:]] if weight is not None else [1, 1]
    strides, dilations = ([int(x) for x in node.attributes[name].as_ints()] if name in node.attributes else [1, 1]
                          for name in ("strides", "dilations"))  # fmt: skip
    totals = [
        max(0, (-(-int(size) // s) - 1) * s + (k - 1) * d + 1 - int(size))
        for size, k, s, d in zip(shape[2:], kernel, strides, dilations)
    ]
    return [*(total // 2 for total in totals), *(total - total // 2 for total in totals)]


_REWRITES = {
    "Reshape": _reshape,
    "Resize": _resize,
    "Expand": _expand,
    "Gather": _parts.gather,
    "GridSample": _parts.grid_sample,
    "Slice": _parts.slice_,
    "Split": _parts.split,
    "Tile": _parts.tile,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Conv": _same_padding,
}


def _check_constants(walk: Walk, node: ir.Node) -> None:
    """Refuse weights that were made for the old size."""
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    moving = [walk.new[value] for value in node.inputs if value is not None and value in walk.new]
    if node.op_type in ("MatMul", "Gemm") and constants and moving:
        rows = shape_of(constants[0])[-2 if node.op_type == "MatMul" else 0]
        if node.op_type == "MatMul" and node.inputs[1] is constants[0] and moving[0][-1] != rows:
            raise Unsupported(
                f"layer {node.name!r} has weights for {rows} numbers, a flattened feature map of the old size: only a model that "
                "pools its features can be re-sized"
            )
    if node.op_type in _BROADCASTING and moving:
        was = next(walk.old[value] for value in node.inputs if value is not None and value in walk.new)
        for table in (shape_of(value) for value in constants):
            if not _broadcasts(table, moving[0]):
                raise Unsupported(
                    f"layer {node.name!r} holds a table of {text(table)} for {text(was)}: a number for each place at the old "
                    "size (positions, anchors); give the PyTorch model, whose positions can be resampled"
                )


_BROADCASTING = (
    "Add",
    "Div",
    "LayerNormalization",
    "Max",
    "Min",
    "Mul",
    "PRelu",
    "Pow",
    "Sub",
    "Where",
)


def _broadcasts(one: Shape, other: Shape) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(reversed(one), reversed(other)))


def _infer(walk: Walk, node: ir.Node, opset: int) -> None:
    """Compute the new shapes of a node's outputs with ONNX's own rules, and remember how map sizes changed."""
    import onnx

    types, data = {}, {}
    for value in node.inputs:
        if value is None or not value.name or value.dtype is None:
            continue
        types[value.name] = onnx.helper.make_tensor_type_proto(
            int(value.dtype), list(walk.new.get(value, shape_of(value)))
        )
        if value.const_value is not None and value.const_value.size <= _SMALL:
            data[value.name] = ir.serde.serialize_tensor(value.const_value)
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    try:
        found = onnx.shape_inference.infer_node_outputs(
            schema, ir.serde.serialize_node(node), types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except onnx.shape_inference.InferenceError as error:
        said = re.sub(r"^\[\w+\] *", "", " ".join(str(error).split()))
        raise Unsupported(
            f"layer {node.name!r} ({node.op_type}) cannot take the map that {format_size(walk.resolution)} gives it: {said[:160]}"
        ) from error
    for value in node.outputs:
        if value.name not in found or not found[value.name].tensor_type.HasField("shape"):
            raise Unsupported(
                f"layer {node.name!r} ({node.op_type}) has an output whose size cannot be told beforehand"
            )
        dims = found[value.name].tensor_type.shape.dim
        walk.old[value] = shape_of(value)
        walk.new[value] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "batch" for d in dims)
        if len(dims) == 4:
            for axis in (2, 3):
                walk.follows.setdefault((axis, walk.old[value][axis]), walk.new[value][axis])
