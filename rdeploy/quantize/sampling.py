"""Sample what the rows of a layer's weights are multiplied with: an activation goes in, (groups, samples, inputs) comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize.placement import weight_of

SAMPLES_AN_INPUT, FEWEST, MOST = 6, 1024, 12288
MOST_INPUTS = 2400
"""A row of weights longer than this has moments that would take more memory than the network."""


class Sampler:
    """Samples one layer's input at random places, the same ones for the same image.

    `inputs` is the length of a row of weights, 0 for a layer that cannot be sampled: a ConvTranspose, weights that several
    layers share, a convolution over other than two axes, or rows that are too long. For 0 images nothing is sampled.
    """

    def __init__(self, node: ir.Node, images: int) -> None:
        self._node = node
        self.groups, self.inputs = _layout(node)
        self.inputs = 0 if self.inputs > MOST_INPUTS or not images else self.inputs
        wanted = min(max(SAMPLES_AN_INPUT * self.inputs, FEWEST), MOST)
        self._samples = -(-wanted // max(images, 1))

    def __call__(self, array: NDArray[np.float32], image: int) -> NDArray[np.float32]:
        """Return samples of what the layer's outputs see in `array`."""
        generator = np.random.default_rng(image)
        if not self.inputs:
            return np.zeros((1, 0, 0), np.float32)
        if self._node.op_type == "MatMul":
            rows = array.reshape(-1, array.shape[-1])
            if len(rows) <= self._samples:
                return rows[None]
            return rows[generator.choice(len(rows), self._samples, replace=False)][None]
        return self._patches(array, generator)

    def _patches(self, array: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
        """Cut out what a convolution sees at some of its output places: padding is zeros, as it is for the kernel."""
        kernel = _kernel(self._node)
        strides, dilations = ints(self._node, "strides", [1, 1]), ints(self._node, "dilations", [1, 1])
        pads = ints(self._node, "pads", [0, 0, 0, 0])
        padded = np.pad(array, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        places = []
        for d in range(2):
            reach = dilations[d] * (kernel[d] - 1)
            outputs = (padded.shape[2 + d] - reach - 1) // strides[d] + 1
            places.append(np.arange(outputs) * strides[d])
        grid = np.stack(np.meshgrid(np.arange(len(array)), *places, indexing="ij"), axis=-1).reshape(-1, 3)
        if len(grid) > self._samples:
            grid = grid[generator.choice(len(grid), self._samples, replace=False)]
        rows = grid[:, 1, None, None] + np.arange(kernel[0])[None, :, None] * dilations[0]
        columns = grid[:, 2, None, None] + np.arange(kernel[1])[None, None, :] * dilations[1]
        found = padded[grid[:, 0, None, None], :, rows, columns]  # (samples, kh, kw, C)
        found = found.transpose(3, 0, 1, 2).reshape(self.groups, -1, len(grid), kernel[0] * kernel[1])
        return np.ascontiguousarray(found.transpose(0, 2, 1, 3).reshape(self.groups, len(grid), -1))


def _layout(node: ir.Node) -> tuple[int, int]:
    """Return (groups, inputs of a row of weights), (1, 0) for a layer that is not sampled."""
    weight = weight_of(node)
    if weight is None or weight.shape is None or len(list(weight.uses())) > 1:
        return 1, 0
    shape = [int(side) for side in weight.shape]
    if node.op_type == "MatMul":
        return (1, shape[0]) if len(shape) == 2 else (1, 0)
    automatic = "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("", "NOTSET")
    if node.op_type != "Conv" or len(shape) != 4 or automatic:
        return 1, 0
    return (node.attributes["group"].as_int() if "group" in node.attributes else 1), shape[1] * shape[2] * shape[3]


def _kernel(node: ir.Node) -> Sequence[int]:
    weight = weight_of(node)
    return [int(side) for side in weight.shape[2:]] if weight is not None and weight.shape is not None else [1, 1]


def ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    """Return an attribute of integers."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else default
