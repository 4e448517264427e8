"""Layers that take parts of a map at places that were fixed for one size: rewritten for the new size, or refused."""

from __future__ import annotations

import onnx_ir as ir

from rdeploy.errors import Unsupported
from rdeploy.graph._walk import Shape, Walk, ints, set_constant, shape_of

_BORDER = 2
"""So many pixels (or prefix tokens) at an end, and less than half of the map, mean the border at any size."""


def slice_(walk: Walk, node: ir.Node) -> None:
    """A cut to the end of a map, or to the size of one met before, stays one; a part in the middle is refused."""
    source = node.inputs[0]
    starts, ends = ints(node.inputs[1]), ints(node.inputs[2])
    if source is None or starts is None or ends is None:
        return
    axes = ints(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(len(starts)))
    old, new = walk.old[source], walk.new[source]
    written = list(ends)
    for index, axis in enumerate(axes or []):
        before, after, start, end = old[axis], new[axis], starts[index], ends[index]
        if before == after or not isinstance(before, int):
            continue
        place = axis % len(old)
        if start == 0 and (place, end) in walk.follows:
            written[index] = int(walk.follows[place, end])
        elif end == before and _at_the_border(start, before):
            written[index] = int(after)
        elif not (_at_the_border(start, before) and _reaches_the_border(end, before)):
            raise Unsupported(
                f"layer {node.name!r} cuts pixels {start} to {end} out of the {before} of its map: a part that fits the old size "
                "only"
            )
    if written != ends:
        set_constant(walk.graph, node, 2, written)


def _at_the_border(start: int, size: int) -> bool:
    """Whether an index counts a few pixels from either end."""
    return start >= size or start <= -size or (abs(start) <= _BORDER and 2 * abs(start) < size)


def _reaches_the_border(end: int, size: int) -> bool:
    """Whether an end is that of the map, or counts a few pixels from there."""
    return end > size or end <= -size or (end < 0 and _at_the_border(end, size))


def split(walk: Walk, node: ir.Node) -> None:
    """Parts of fixed size are refused."""
    source = node.inputs[0]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if source is not None and walk.old[source][axis] != walk.new[source][axis]:
        raise Unsupported(f"layer {node.name!r} splits its map into parts of fixed size: they fit the old size only")


def gather(walk: Walk, node: ir.Node) -> None:
    """All rows stay all rows, and the first or last one stays it; others are refused."""
    source, chosen = node.inputs[0], ints(node.inputs[1])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if source not in walk.new or chosen is None or source is None:
        return
    before, after = walk.old[source][axis], walk.new[source][axis]
    if before == after or chosen in ([0], [-1]):
        return
    if not isinstance(before, int) or chosen != list(range(before)):
        raise Unsupported(f"layer {node.name!r} picks pixels of its map by their numbers: they fit the old size only")
    set_constant(walk.graph, node, 1, list(range(int(after))))


def tile(walk: Walk, node: ir.Node) -> None:
    """One pixel that is repeated over a map is repeated over the new one."""
    source, repeats = node.inputs[0], ints(node.inputs[1])
    output = shape_of(node.outputs[0])
    if source is None or repeats is None or len(output) != 4:
        return
    written = list(repeats)
    for axis in (2, 3):
        if repeats[axis] != 1 and walk.old[source][axis] == 1:
            written[axis] = int(walk.followed(axis, output[axis], (1, 1)))
    if written != repeats:
        set_constant(walk.graph, node, 1, written)


def grid_sample(walk: Walk, node: ir.Node) -> None:
    """A grid that is a constant is refused."""
    if node.inputs[1] is not None and node.inputs[1].is_initializer():
        raise Unsupported(f"layer {node.name!r} samples its map on a fixed grid: it fits the old size only")


def unshuffled(node: ir.Node, new: Shape, target: Shape) -> Shape | None:
    """Return what `torch.pixel_unshuffle` reshapes the new map into, cells of as many pixels; None where it is something else."""
    users = [use.node for use in node.outputs[0].uses()]
    if len(target) != 6 or [user.op_type for user in users] != ["Transpose"]:
        return None
    if list(users[0].attributes["perm"].as_ints()) != [0, 1, 3, 5, 2, 4]:
        return None
    sides = [(int(side), int(cell)) for side, cell in zip(new[2:], (target[3], target[5]))]
    if any(side % cell for side, cell in sides):
        return None
    return (*target[:2], *(size for side, cell in sides for size in (side // cell, cell)))
