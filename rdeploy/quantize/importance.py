"""How much each channel of an activation matters to what the network computes: a graph goes in, weights per channel come out.

An error e in channel c of a layer's input reaches the layer's outputs o as W[o, c] e; with errors of different channels
uncorrelated, its mean square there is sum_o W[o, c]^2 e^2, and so on towards the output: the diagonal of a Gauss-Newton
Hessian with every nonlinearity taken as linear. One range serves all the channels of a tensor, and in a depthwise network
their sizes differ by a hundred: a range found with these weights does not give up the small channels that matter.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize.placement import is_constant, weight_of

Weights = NDArray[np.float64]
_THROUGH = (
    "Relu",
    "Clip",
    "LeakyRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Flatten",
    "Reshape",
    "Identity",
)


_CHANNELS_LAST = {"MatMul", "Gemm", "LayerNormalization"}
_ELEMENT_WISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Erf",
    "Gelu",
    "Relu",
    "Clip",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "HardSwish",
    "Cast",
}


def channel_weights(graph: ir.Graph) -> dict[str, Weights]:
    """Return weights of mean 1 per activation, one for each channel; tensors that nothing known reads are left out."""
    found: dict[str, Weights] = {}
    for node in reversed(graph):
        output = node.outputs[0]
        channels = channel_count(output)
        if channels is None:
            continue
        outward = found.get(output.name or "")
        if outward is None or outward.size != channels:
            outward = np.ones(channels)
        for value, weights in _inward(node, outward, known=(output.name or "") in found):
            if value.name and weights.size == channel_count(value):
                found[value.name] = found[value.name] + weights if value.name in found else weights
    return {name: w / w.mean() for name, w in found.items() if math.isfinite(w.sum()) and w.mean() > 0}


def _inward(node: ir.Node, outward: Weights, *, known: bool) -> list[tuple[ir.Value, Weights]]:
    """Return what the node's inputs inherit of its output's weights."""
    sources = [v for v in node.inputs if v is not None and not is_constant(v)]
    weight = weight_of(node) if node.op_type in ("Conv", "Gemm", "MatMul") else None
    if weight is not None and weight.const_value is not None and sources:
        squared = np.square(weight.const_value.numpy().astype(np.float64))
        if outward.size != (outputs := _output_channels(node, squared.shape)):
            outward = np.ones(outputs)
        return [(sources[0], _through_weights(node, squared, outward))]
    if known and node.op_type in (*_THROUGH, "Add"):
        return [(source, outward) for source in sources]
    return []


def _output_channels(node: ir.Node, shape: tuple[int, ...]) -> int:
    """Return how many channels a layer with weights of this shape writes."""
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    return shape[0] if node.op_type == "Conv" or transposed else shape[-1]


def _through_weights(node: ir.Node, squared: Weights, outward: Weights) -> Weights:
    if node.op_type == "Conv":
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        taps = squared.reshape(groups, squared.shape[0] // groups, squared.shape[1], -1).sum(axis=-1)
        return np.asarray((taps * outward.reshape(groups, -1, 1)).sum(axis=1).reshape(-1))
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int()
    matrix = squared.T if transposed else squared
    return np.asarray(matrix.reshape(-1, matrix.shape[-1]) @ outward)


def channel_axis(value: ir.Value) -> int | None:
    """Return which axis of an activation is its channel, by what reads or writes it; None where its rank is unknown.

    A convolution reads and writes (N, C, H, W), a Linear layer or a LayerNormalization (N, ..., C); windowed attention and
    ConvNeXt hold both kinds of four-dimensional tensors.
    """
    if value.shape is None or len(value.shape) < 2:
        return None
    last = len(value.shape) - 1
    readers = {user.op_type for user, index in value.uses() if index == 0 or user.op_type == "Add"}
    if readers & _CHANNELS_LAST or _writer(value) in _CHANNELS_LAST:
        return last
    return 1 if last in (1, 3) else last


def _writer(value: ir.Value) -> str | None:
    """Return the type of the layer that a value comes from, whatever changed it element by element since."""
    node = value.producer()
    while node is not None and node.op_type in _ELEMENT_WISE:
        rank = len(node.outputs[0].shape or ())
        sources = [v for v in node.inputs if v is not None and not is_constant(v) and len(v.shape or ()) == rank]
        node = sources[0].producer() if sources else None
    return node.op_type if node is not None else None


def channel_count(value: ir.Value) -> int | None:
    """Return the number of channels of an activation, None where the graph does not say."""
    axis = channel_axis(value)
    size = value.shape[axis] if axis is not None and value.shape is not None else None
    return int(size) if isinstance(size, int) else None


def channel_axes(graph: ir.Graph) -> dict[str, int]:
    """Return the channel axis of every activation whose rank is known, by name."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return {value.name: axis for value in values if value.name and (axis := channel_axis(value)) is not None}
