"""Dense outputs come back at the native size, boxes in its pixels: a smaller variant's ir.Model is rewritten in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rdeploy.types import Size

_ROI, _SCALES, _SIZES = 1, 2, 3


def restore_size(model: ir.Model, sizes: Sequence[Size | None]) -> tuple[str, ...]:
    """Let every output (N, C, h, w) have the height and width of `sizes`; return the names of those that changed.

    `sizes` has an entry an output, None for those that are left alone. A bilinear resize that already stands at the
    end gets the new size itself (resizing twice would be slower and blur); otherwise one is added. Half-pixel
    centres, as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    changed = []
    for index, size in enumerate(sizes):
        value = model.graph.outputs[index]
        shape = None if value.shape is None else list(value.shape)
        if size is None or shape is None or len(shape) != 4 or tuple(shape[2:]) == tuple(size):
            continue
        last = value.producer()
        source = last.inputs[0] if last is not None and _is_bilinear(last) and len(value.uses()) == 0 else None
        if source is None:
            _append(model.graph, index, value, size)
        else:
            _retarget(model.graph, last, source, size)
            value.shape = ir.Shape([*shape[:2], *size])
        changed.append(model.graph.outputs[index].name or "")
    return tuple(changed)


def scale_boxes(model: ir.Model, index: int, axis: int, *, factors: tuple[float, float]) -> None:
    """Multiply the boxes of an output, four numbers (x, y, x, y) first along `axis`, by factors (down, across)."""
    value = model.graph.outputs[index]
    name, shape = value.name or f"output{index}", list(value.shape or ())
    numbers = np.ones(int(shape[axis]), np.float32)
    numbers[:4] = (factors[1], factors[0]) * 2
    scale = _constant(
        model.graph, f"{name}_scale", numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    )
    value.name = f"{name}_small"
    scaled = ir.node("Mul", [value, scale], name=f"{name}_restore")
    scaled.outputs[0].name, scaled.outputs[0].dtype, scaled.outputs[0].shape = name, value.dtype, value.shape
    model.graph.append(scaled)
    model.graph.outputs[index] = scaled.outputs[0]


def _is_bilinear(node: ir.Node) -> bool:
    """Whether a node enlarges bilinearly with half-pixel centres and without antialiasing."""
    if node.op_type != "Resize":
        return False
    told = {name: attribute.value for name, attribute in node.attributes.items()}
    centres = told.get("coordinate_transformation_mode", "half_pixel")
    plain = not told.get("antialias", 0) and "axes" not in told
    return told.get("mode") == "linear" and centres in ("half_pixel", "pytorch_half_pixel") and plain


def _append(graph: ir.Graph, index: int, value: ir.Value, size: Size) -> None:
    """Add a resize behind an output, under the output's own name."""
    name, shape = value.name or f"output{index}", list(value.shape or ())
    value.name = f"{name}_small"
    resize = ir.node(
        "Resize",
        [value, None, None, None],
        attributes={"mode": "linear", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "floor"},
        name=f"{name}_restore",
    )
    resize.outputs[0].name, resize.outputs[0].dtype = name, value.dtype
    resize.outputs[0].shape = ir.Shape([*shape[:2], *size])
    graph.append(resize)
    graph.outputs[index] = resize.outputs[0]
    _retarget(graph, resize, value, size)


def _retarget(graph: ir.Graph, node: ir.Node, source: ir.Value, size: Size) -> None:
    """Give a Resize its size: whole sizes for a fixed batch, otherwise factors (the batch has none to name)."""
    shape = list(source.shape or ())
    fixed = [side for side in shape[:2] if isinstance(side, int)]
    while len(node.inputs) < 4:
        node.resize_inputs(4)
    node.replace_input_with(_ROI, None)
    if len(fixed) == 2:
        sizes = np.array([*fixed, *size], np.int64)
        node.replace_input_with(_SCALES, None)
        node.replace_input_with(_SIZES, _constant(graph, f"{node.name}_sizes", sizes))
        return
    # A hair more than the exact factor: what it gives is rounded down.
    factors = [np.nextafter(np.float32(to / int(side)), np.float32(np.inf)) for to, side in zip(size, shape[2:])]
    node.replace_input_with(_SCALES, _constant(graph, f"{node.name}_scales", np.array([1, 1, *factors], np.float32)))
    node.replace_input_with(_SIZES, None)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
