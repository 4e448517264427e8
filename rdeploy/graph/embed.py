"""Put the preprocessing into the graph: an ir.Model of normalised images goes in, one of uint8 pictures comes out.

The new input is (N, H, W, C), uint8, at the native size: what the native engine's own preprocessing has cut out. Inside,
it is resized as Pillow does and normalised. A resize along one axis is a product with a constant matrix, which every
runtime has, where an antialiased Resize is not (TensorRT). Pillow rounds to 8 bits after each axis, horizontal first,
and so does the graph: what the network sees differs from Pillow by at most one step of 255, where a tie is rounded
the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported
from rdeploy.types import Preprocessing, Size

INPUT = "image"
PREFIX = "rdeploy_preprocess"


def embed(model: ir.Model, native: Size, preprocessing: Preprocessing) -> None:
    """Let the graph take uint8 (N, H, W, C) pictures of the `native` size (h, w), in place.

    Raises:
        Unsupported: the graph's input is not one floating-point tensor (N, C, h, w) of known size.
    """
    inner = model.graph.inputs[0]
    shape = list(inner.shape or ())
    if len(model.graph.inputs) != 1 or len(shape) != 4 or not all(isinstance(side, int) for side in shape[1:]):
        raise Unsupported(f"the preprocessing cannot be put in front of the input {inner.name!r} of shape {shape}")
    channels, resolution = int(shape[1]), (int(shape[2]), int(shape[3]))
    outer = ir.Value(name=INPUT, shape=ir.Shape([shape[0], *native, channels]), type=ir.TensorType(ir.DataType.UINT8))
    steps = _Steps(model.graph, shape[0])
    value = steps.cast(outer, ir.DataType.FLOAT)
    value = steps.add("Transpose", [value], perm=[0, 3, 1, 2], shape=[channels, *native])
    kind = (preprocessing.interpolation, preprocessing.antialias)
    if native[1] != resolution[1]:
        columns = resize_matrix(native[1], resolution[1], *kind).T
        value = steps.rounded(steps.add("MatMul", [value, columns], shape=[channels, native[0], resolution[1]]))
    if native[0] != resolution[0]:
        rows = resize_matrix(native[0], resolution[0], *kind)
        value = steps.rounded(steps.add("MatMul", [rows, value], shape=[channels, *resolution]))
    scale = 1.0 / (255.0 * np.array(preprocessing.std, np.float64))
    offset = -np.array(preprocessing.mean, np.float64) / np.array(preprocessing.std, np.float64)
    for operator, numbers in (("Mul", scale), ("Add", offset)):
        value = steps.add(operator, [value, numbers.reshape(1, channels, 1, 1)], shape=[channels, *resolution])
    if inner.dtype is not None and inner.dtype != ir.DataType.FLOAT:
        value = steps.cast(value, inner.dtype)
    inner.replace_all_uses_with(value)
    model.graph.inputs[0] = outer
    first = next(iter(model.graph))
    model.graph.insert_before(first, steps.nodes)


class _Steps:
    """The nodes of the preprocessing, in order; constants are float32 initializers."""

    def __init__(self, graph: ir.Graph, batch: int | ir.SymbolicDim) -> None:
        self._graph, self._batch = graph, batch
        self.nodes: list[ir.Node] = []

    def add(
        self, operator: str, inputs: Sequence[ir.Value | NDArray[np.float64]], *, shape: Sequence[int], **more: object
    ) -> ir.Value:
        """Add a node with a float output (batch, *shape)."""
        name = f"{PREFIX}_{len(self.nodes)}"
        values = [v if isinstance(v, ir.Value) else self._constant(f"{name}_{i}", v) for i, v in enumerate(inputs)]
        node = ir.node(operator, values, attributes=dict(more), name=name)
        node.outputs[0].name, node.outputs[0].dtype = f"{name}_out", ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape([self._batch, *shape])
        self.nodes.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        found = self.add("Cast", [value], shape=_known(value), to=int(dtype))
        found.dtype = dtype
        return found

    def rounded(self, value: ir.Value) -> ir.Value:
        """Round half up and clip to 0..255: Pillow keeps 8 bits between the axes."""
        shape = _known(value)
        up = self.add("Add", [value, np.array(0.5)], shape=shape)
        whole = self.add("Floor", [up], shape=shape)
        return self.add("Clip", [whole, np.array(0.0), np.array(255.0)], shape=shape)

    def _constant(self, name: str, array: NDArray[np.float64]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _known(value: ir.Value) -> list[int]:
    return [int(side) for side in list(value.shape or ())[1:]]


def resize_matrix(size: int, to: int, interpolation: str, antialias: bool = True) -> NDArray[np.float64]:
    """Return the matrix (to, size) by which Pillow resizes one axis, with its fixed-point coefficients.

    Without `antialias` a bilinear filter does not widen where the image shrinks (see `preprocess`).
    """
    matrix = np.zeros((to, size))
    scale = size / to
    if interpolation == "nearest":
        # Pillow adds up the step from pixel to pixel, and its rounding errors decide where a pixel lies between two.
        places = np.cumsum([0.5 * scale, *[scale] * (to - 1)])
        matrix[np.arange(to), places.astype(int)] = 1.0
        return matrix
    reach, weight = _FILTERS[interpolation]
    stretch = 1.0 if interpolation == "bilinear" and not antialias else max(scale, 1.0)
    for row in range(to):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - reach * stretch + 0.5))
        last = min(size, int(centre + reach * stretch + 0.5))
        taps = np.array([weight((column - centre + 0.5) / stretch) for column in range(first, last)])
        fixed = taps / taps.sum() * (1 << _PRECISION_BITS)
        matrix[row, first:last] = np.trunc(fixed + np.copysign(0.5, fixed)) / (1 << _PRECISION_BITS)
    return matrix


_PRECISION_BITS = 22  # of Pillow's coefficients for 8-bit images: 32 - 8 - 2


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0.0:
        return 1.0
    return 0.0 if x >= 1.0 else math.sin(math.pi * x) / (math.pi * x) * (0.54 + 0.46 * math.cos(math.pi * x))


def _cubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _lanczos(x: float) -> float:
    return float(np.sinc(x) * np.sinc(x / 3.0)) if -3.0 <= x < 3.0 else 0.0


_FILTERS: dict[str, tuple[float, Callable[[float], float]]] = {
    "box": (0.5, _box),
    "bilinear": (1.0, _triangle),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, _lanczos),
}
"""Pillow's filters: how far they reach, and their weight at a distance."""
