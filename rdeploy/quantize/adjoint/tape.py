"""Write nodes behind a graph's own: values and arrays go in, new values come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported

Shape = tuple[int, ...]


class Tape:
    """Appends nodes to `graph`; `shapes` are those of values whose own shape is not known."""

    def __init__(self, graph: ir.Graph, shapes: Mapping[str, Shape]) -> None:
        self.graph = graph
        self._shapes = shapes
        self._made = 0

    def op(self, kind: str, *inputs: ir.Value | NDArray[Any] | None, **attributes: Any) -> ir.Value:
        """Append a node; return what it writes."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: ir.Value | NDArray[Any] | None, **attributes: Any
    ) -> list[ir.Value]:
        """Append a node of several outputs."""
        values = [self.constant(value) if isinstance(value, np.ndarray) else value for value in inputs]
        node = ir.node(kind, values, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = self._name()
        self.graph.append(node)
        return list(node.outputs)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """Return an array as a value."""
        name = self._name()
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def scaled(self, value: ir.Value, factor: float) -> ir.Value:
        """Return the value times a number."""
        return value if factor == 1.0 else self.op("Mul", value, np.full(1, factor, np.float32))

    def reshaped(self, value: ir.Value | None, shape: Shape) -> ir.Value:
        """Return the value in another shape."""
        return self.op("Reshape", value, np.array(shape, np.int64))

    def summed(self, value: ir.Value, shape: Shape, to: Shape) -> ir.Value:
        """Return a value of `shape` added up over the axes that a tensor of the shape `to` was broadcast along."""
        if shape == to:
            return value
        longer = len(shape) - len(to)
        axes = [i for i, side in enumerate(shape) if i < longer or (to[i - longer] == 1 and side != 1)]
        if axes:
            value = self.op("ReduceSum", value, np.array(axes, np.int64), keepdims=1)
        return self.reshaped(value, to) if longer else value

    def padded(self, value: ir.Value, axis: int, rank: int, before: int, after: int) -> ir.Value:
        """Return the value with zeros before and after it along an axis; negative numbers cut."""
        if not before and not after:
            return value
        pads = np.zeros(2 * rank, np.int64)
        pads[axis], pads[rank + axis] = before, after
        return self.op("Pad", value, pads)

    def shape(self, value: ir.Value | None) -> Shape:
        """Return the sides of a value of the graph."""
        if value is not None and value.const_value is not None:
            return tuple(int(side) for side in value.const_value.shape)
        name = (value.name or "") if value is not None else ""
        known = value.shape if value is not None else None
        sides = self._shapes.get(name, tuple(known) if known is not None else None)
        if sides is None or not all(isinstance(side, int) for side in sides):
            raise Unsupported(f"the shape of {name!r} is not known", stage="quantize")
        return tuple(int(str(side)) for side in sides)

    def _name(self) -> str:
        self._made += 1
        return f"::adjoint{self._made}"


def number(value: ir.Value | None) -> NDArray[Any]:
    """Return a constant.

    Raises:
        Unsupported: the value is computed.
    """
    if value is None or value.const_value is None:
        raise Unsupported(f"{value.name if value is not None else 'an input'!r} is computed", stage="quantize")
    return np.asarray(value.const_value.numpy())
