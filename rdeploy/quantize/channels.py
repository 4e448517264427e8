"""Find the tensors of a graph that share their channels: what scales one channel of one of them must scale it in all.

A factor per channel passes through ReLU, pooling, additions, reshapes, the value path of attention, and what cuts, pads and
joins along other axes (the windows of Swin, rolled or not); convolutions, Linear layers and LayerNormalization can write it
(their weights are scaled along the output) or take it back (along the input). Everything else holds a group fast: its factor
stays 1. A Clip whose lower end is 0 passes a factor where no value is clipped.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from rdeploy.quantize.placement import WEIGHTED, is_constant, weight_of

Axes = tuple[int, ...]
_SAME = {"Relu", "LeakyRelu", "Identity", "Dropout", "Clip"}
_SPATIAL = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"}
_RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_MOVING = _RESHAPING | {"Identity", "Dropout", "Transpose", "Slice", "Split", "Gather", "Concat"}
_AVERAGING = {"MaxPool", "GlobalAveragePool", "GlobalMaxPool", "Resize"}
"""What changes the place of values, or picks and averages them: whatever is added to a channel goes through as well."""
SMOOTHED = "::smoothed"
"""What the name of a Mul ends with that is there to scale channels (`repair/smoothing.py`)."""


@dataclasses.dataclass(slots=True, eq=False)
class Group:
    """Tensors that share `size` channels. `tensors` maps a name to the axes that hold its channels.

    `writers` and `readers` are the layers whose weights take the factor in and out; `biases` are the (Add, index) pairs
    whose constant is scaled with it; `clips` limit it; `fixed` says that the factor has to stay 1, `moved` that the tensors
    hold the values of the writers in other places, averages or sums of them, so that a channel can be shifted as well.
    """

    size: int
    tensors: dict[str, Axes]
    writers: list[ir.Node] = dataclasses.field(default_factory=list)
    readers: list[ir.Node] = dataclasses.field(default_factory=list)
    biases: list[tuple[ir.Node, int]] = dataclasses.field(default_factory=list)
    clips: list[ir.Node] = dataclasses.field(default_factory=list)
    fixed: bool = False
    moved: bool = True


def groups(graph: ir.Graph) -> list[Group]:
    """Return the groups that can be scaled: they have writers and readers, and nothing holds them fast."""
    found = _Groups()
    for node in graph:
        _visit(found, node)
    for value in graph.outputs:
        found.fix(value)
    unique = {id(group): group for group in found.of.values()}
    return [g for g in unique.values() if not g.fixed and g.writers and g.readers]


class _Groups:
    """The group of every tensor, by name; joining two makes them one object."""

    def __init__(self) -> None:
        self.of: dict[str, Group] = {}

    def get(self, value: ir.Value | None) -> Group | None:
        return self.of.get(value.name or "") if value is not None else None

    def axes(self, value: ir.Value | None) -> Axes | None:
        group = self.get(value)
        return group.tensors[value.name or ""] if group is not None and value is not None else None

    def start(self, value: ir.Value, axes: Axes) -> Group | None:
        size = _size(value, axes)
        if size is None or not value.name:
            return None
        self.of[value.name] = group = Group(size=size, tensors={value.name: axes})
        return group

    def fix(self, value: ir.Value | None) -> None:
        group = self.get(value)
        if group is not None:
            group.fixed = True

    def join(self, source: ir.Value, value: ir.Value, axes: Axes, *, moved: bool = False) -> None:
        """Let `value` have the channels of `source`; where their number differs, both are held fast."""
        group = self.get(source)
        if group is None:
            return
        group.moved &= moved
        other = self.get(value)
        if other is not None and other is not group:
            self._merge(group, other)
        elif _size(value, axes) != group.size or not value.name:
            group.fixed = True
        else:
            group.tensors[value.name] = axes
            self.of[value.name] = group

    def _merge(self, group: Group, other: Group) -> None:
        group.fixed |= other.fixed or other.size != group.size
        group.moved &= other.moved
        group.tensors.update(other.tensors)
        for name in other.tensors:
            self.of[name] = group
        for mine, theirs in (
            (group.writers, other.writers),
            (group.readers, other.readers),
            (group.biases, other.biases),
            (group.clips, other.clips),
        ):
            mine.extend(theirs)  # type: ignore[arg-type]


def _size(value: ir.Value, axes: Axes) -> int | None:
    if value.shape is None or any(axis >= len(value.shape) for axis in axes):
        return None
    sides = [value.shape[axis] for axis in axes]
    return math.prod(int(s) for s in sides) if all(isinstance(s, int) for s in sides) else None


def _visit(found: _Groups, node: ir.Node) -> None:
    """Enter one node: it reads, writes or passes on channels, or holds fast what it reads."""
    inputs = [v for v in node.inputs if v is not None and not is_constant(v)]
    output = node.outputs[0]
    if node.op_type in WEIGHTED and weight_of(node) is not None:
        _visit_layer(found, node)
    elif _scales_last_axis(node):
        found.fix(node.inputs[0])
        if output.shape is not None and (group := found.start(output, (len(output.shape) - 1,))) is not None:
            group.writers.append(node)
    elif not _pass_on(found, node, inputs):
        for value in inputs:
            found.fix(value)


def _visit_layer(found: _Groups, node: ir.Node) -> None:
    source, output, weight = node.inputs[0], node.outputs[0], weight_of(node)
    rank = len(output.shape) if output.shape is not None else 0
    axis = 1 if node.op_type in ("Conv", "ConvTranspose") else rank - 1
    alone = weight is not None and len(list(weight.uses())) == 1 and node.op_type in ("Conv", "MatMul")
    plain = (
        alone and weight is not None and weight.shape is not None and (node.op_type == "Conv" or len(weight.shape) == 2)
    )
    reads = found.get(source)
    if reads is not None and plain and found.axes(source) == (axis,):
        reads.readers.append(node)
    else:
        found.fix(source)
    written = found.start(output, (axis,)) if rank else None
    if written is not None:
        written.writers.append(node)
        written.fixed |= not plain


def _scales_last_axis(node: ir.Node) -> bool:
    """Whether this is a LayerNormalization with a scale over the last axis alone, or the Mul of smoothing, which is one."""
    if node.op_type != "LayerNormalization":
        return node.op_type == "Mul" and (node.name or "").endswith(SMOOTHED)
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    return is_constant(scale) and scale is not None and scale.shape is not None and len(scale.shape) == 1


def _pass_on(found: _Groups, node: ir.Node, inputs: list[ir.Value]) -> bool:
    """Whether the node passes its input's channels on; its output then belongs to the same group."""
    if not inputs or not node.outputs[0].name:
        return False
    axes, output = found.axes(inputs[0]), node.outputs[0]
    if node.op_type == "MatMul" and len(inputs) == 2:
        return _pass_values(found, inputs, output)
    if node.op_type == "Add" and len(inputs) == 2:
        return _pass_sum(found, inputs, output)
    if node.op_type == "Mul" and len(inputs) == 2:
        return _pass_gate(found, inputs, output)
    if axes is None or len(inputs) != 1:
        return node.op_type == "Concat" and _pass_concat(found, node, inputs)
    if node.op_type == "Split":
        return _pass_parts(found, node, inputs[0], axes)
    after = _axes_after(node, axes, inputs[0])
    if after is None or (node.op_type == "Clip" and not is_relu_n(node)):
        return False
    found.join(inputs[0], output, after, moved=_keeps_shift(node))
    group = found.get(output)
    if group is None:
        return False
    if node.op_type == "Clip":
        group.clips.append(node)
    if node.op_type == "Add":
        group.biases.append((node, 1 - next(i for i, v in enumerate(node.inputs) if v is inputs[0])))
    return True


def _keeps_shift(node: ir.Node) -> bool:
    """Whether what is added to all values of a channel is added to all of the output's as well."""
    if node.op_type == "AveragePool":
        padded = "pads" in node.attributes and any(node.attributes["pads"].as_ints())
        automatic = "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("NOTSET", "VALID")
        return not padded and not automatic
    return node.op_type in _MOVING | _AVERAGING | {"Add"}


def _axes_after(node: ir.Node, axes: Axes, source: ir.Value) -> Axes | None:
    """Return the axes of the output that hold the channels of the node's one activation, None where they are mixed."""
    output = node.outputs[0]
    if node.op_type in _SAME:
        return axes
    if node.op_type in _SPATIAL:
        return axes if axes == (1,) else None
    if node.op_type in ("Add", "Mul", "Div"):
        other = next(v for v in node.inputs if v is not source)
        same = source.shape is not None and output.shape is not None and list(source.shape) == list(output.shape)
        divides = node.op_type != "Div" or node.inputs[0] is source
        single = (
            node.op_type != "Add"
            or (len(axes) == 1 and axes[0] == len(source.shape or ()) - 1)
            or _fits(other, axes, source)
        )
        return axes if same and divides and single else None
    if node.op_type == "Transpose" and "perm" in node.attributes:
        order = list(node.attributes["perm"].as_ints())
        moved = tuple(order.index(axis) for axis in axes)
        return moved
    if node.op_type in _RESHAPING:
        return _reshaped(axes, source, output)
    if node.op_type == "Gather":
        return _gathered(node, axes, source)
    if node.op_type in ("Slice", "Pad") and source.shape is not None:
        return axes if _cut(node, len(source.shape)).isdisjoint(axes) else None
    return None


def _gathered(node: ir.Node, axes: Axes, source: ir.Value) -> Axes | None:
    """Rows or columns that are picked: a list of them, or one, whose axis is gone then."""
    picked, rank = node.inputs[1], len(source.shape or ())
    along = _attribute(node, "axis", 0) % max(rank, 1)
    if node.inputs[0] is not source or picked is None or picked.shape is None or len(picked.shape) > 1 or along in axes:
        return None
    return axes if len(picked.shape) else tuple(axis - (axis > along) for axis in axes)


def _cut(node: ir.Node, rank: int) -> set[int]:
    """Return the axes along which a Slice cuts or a Pad adds zeros; all of them where that is not known, or no zeros."""
    constants = [_numbers(value) for value in node.inputs[1:]]
    given = constants[2] if len(constants) > 2 else None
    if not constants or constants[0] is None or (given is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return set(range(rank))
    if node.op_type == "Slice":
        return {axis % rank for axis in (given if given is not None else range(len(constants[0])))}
    zeros = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
    filled = len(node.inputs) > 2 and node.inputs[2] is not None and constants[1] != [0]
    if not zeros or filled:
        return set(range(rank))
    along = given if given is not None else range(len(constants[0]) // 2)
    pads = zip(constants[0], constants[0][len(constants[0]) // 2 :])
    return {axis % rank for axis, sides in zip(along, pads) if any(sides)}


def _numbers(value: ir.Value | None) -> list[int] | None:
    constant = value.const_value if value is not None else None
    return None if constant is None else [int(number) for number in constant.numpy().reshape(-1)]


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _fits(constant: ir.Value | None, axes: Axes, source: ir.Value) -> bool:
    """Whether a constant that is added has an axis for the channels (or none at all, which makes it a single number)."""
    if constant is None or constant.shape is None or source.shape is None:
        return False
    return len(axes) == 1 and len(constant.shape) in (0, len(source.shape) - axes[0], len(source.shape))


def _reshaped(axes: Axes, source: ir.Value, output: ir.Value) -> Axes | None:
    """Channels that are the last axes stay the last ones; (N, C, 1, 1) becomes (N, C)."""
    if source.shape is None or output.shape is None:
        return None
    before, after = list(source.shape), list(output.shape)
    size = _size(source, axes)
    if not all(isinstance(s, int) for s in (*before, *after)) or size is None:
        return None
    if axes == (1,) and len(before) > 2 and math.prod(before[2:]) == 1:
        return (1,) if len(after) > 1 and after[1] == size and math.prod(after[2:]) == 1 else None
    if axes != tuple(range(len(before) - len(axes), len(before))):
        return None
    for count in range(1, len(after) + 1):
        if math.prod(after[-count:]) == size:
            return tuple(range(len(after) - count, len(after)))
    return None


def _pass_values(found: _Groups, inputs: list[ir.Value], output: ir.Value) -> bool:
    """Attention mixes tokens: the channels of the values (its second factor) stay what they are."""
    mixing, values = inputs
    found.fix(mixing)
    axes = found.axes(values)
    if axes is None or values.shape is None or len(values.shape) - 2 in axes:
        return False
    found.join(values, output, axes)
    return True


def _pass_sum(found: _Groups, inputs: list[ir.Value], output: ir.Value) -> bool:
    first, second = inputs
    shapes = [list(v.shape) if v.shape is not None else None for v in (*inputs, output)]
    axes = found.axes(first)
    if axes is None or axes != found.axes(second) or shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        return False
    found.join(first, second, axes, moved=True)
    found.join(first, output, axes, moved=True)
    return True


def _pass_gate(found: _Groups, inputs: list[ir.Value], output: ir.Value) -> bool:
    """Squeeze and excite: the gate has one number a channel, and the gated tensor keeps its channels."""
    gated = next(
        (v for v in inputs if v.shape is not None and output.shape is not None and v.shape == output.shape), None
    )
    gate = next((v for v in inputs if v is not gated), None)
    axes = found.axes(gated)
    if gated is None or gate is None or axes is None or gate.shape is None or gate.shape == output.shape:
        return False
    found.fix(gate)
    found.join(gated, output, axes)
    return True


def _pass_concat(found: _Groups, node: ir.Node, inputs: list[ir.Value]) -> bool:
    """Tensors that are joined along another axis than their channels share them."""
    axes, along = found.axes(inputs[0]), _attribute(node, "axis", 0)
    rank = len(node.outputs[0].shape or ())
    if axes is None or len(inputs) != len(node.inputs) or any(found.axes(v) != axes for v in inputs):
        return False
    if along % max(rank, 1) in axes:
        return False
    for value in (*inputs[1:], node.outputs[0]):
        found.join(inputs[0], value, axes, moved=True)
    return True


def _pass_parts(found: _Groups, node: ir.Node, source: ir.Value, axes: Axes) -> bool:
    """The parts of a tensor that is split along another axis than its channels have them all."""
    if source.shape is None or _attribute(node, "axis", 0) % len(source.shape) in axes:
        return False
    for value in node.outputs:
        found.join(source, value, axes, moved=True)
    return True


def is_relu_n(node: ir.Node) -> bool:
    """Whether a Clip is a ReLU with an upper end: constant limits, the lower one 0."""
    ends = [node.inputs[i] if len(node.inputs) > i else None for i in (1, 2)]
    if any(v is not None and (not is_constant(v) or v.const_value is None) for v in ends) or ends[0] is None:
        return False
    low = ends[0].const_value
    return low is not None and float(low.numpy().reshape(())) == 0.0


def clip_limit(node: ir.Node) -> float:
    """Return a Clip's upper end, infinity where it has none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = value.const_value if value is not None else None
    return math.inf if tensor is None else float(tensor.numpy().reshape(()))
