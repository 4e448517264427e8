"""What a walk through a graph that is re-sized knows, and how its constants are read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from rdeploy.types import Size

Dim = int | str
Shape = tuple[Dim, ...]


@dataclass(slots=True)
class Walk:
    graph: ir.Graph
    resolution: Size
    old: dict[ir.Value, Shape] = field(default_factory=dict)
    new: dict[ir.Value, Shape] = field(default_factory=dict)
    follows: dict[tuple[int, Dim], Dim] = field(default_factory=dict)
    """(axis, old size) of a feature map -> its new size."""
    same_padding: bool = False

    def followed(self, axis: int, old: Dim, source: tuple[Dim, Dim]) -> Dim:
        """Return what a frozen size becomes: that of the map which had it, else in proportion to its source (old, new)."""
        before, after = source
        if (axis, old) in self.follows:
            return self.follows[axis, old]
        if not isinstance(old, int) or not isinstance(before, int) or not isinstance(after, int):
            return old
        return max(1, round(old * after / before))


def set_constant(graph: ir.Graph, node: ir.Node, index: int, values: Sequence[int]) -> None:
    """Give a node's input a constant of its own: others may read the old one."""
    name = f"{node.name}_input{index}"
    tensor = ir.tensor(np.asarray(values, np.int64), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers.pop(name, None)
    graph.register_initializer(value)
    node.replace_input_with(index, value)


def ints(value: ir.Value | None) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(one) for one in tensor.numpy().reshape(-1)]


def shape_of(value: ir.Value) -> Shape:
    return () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)


def text(shape: Shape) -> str:
    return "x".join(map(str, shape))
