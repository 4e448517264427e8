"""Analytic bias correction: a layer's mean error from a Gaussian model of what comes in, not from counting it.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019: what comes out of a
BatchNorm is taken as Gaussian in each channel; a ReLU or Clip behind it makes it a clipped Gaussian, and the mean of that,
rounded or not, is known in closed form. A folded BatchNorm has left its mean and deviation nowhere, so both are measured on
the images: two numbers a channel, which few images tell where the mean of a rounded tensor would take many. Exact where the
model holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize import qdq
from rdeploy.quantize.importance import channel_axes
from rdeploy.quantize.placement import FUSED, place
from rdeploy.quantize.ranges import Range, activations
from rdeploy.quantize.repair.bias_correction import Shifts, both_weights, key_of, mean_read, output_shift
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
_GAUSSIAN = ("Conv", "Gemm", "MatMul", "Add", "BatchNormalization", "LayerNormalization")
"""What sums many terms, or is normalised: its output is taken as Gaussian."""


def observe_shifts(
    path: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    batches: Iterable[NDArray[np.float32]],
    weights: Mapping[str, qdq.QuantizedWeight],
    *,
    keep_float: Sequence[str] = (),
) -> Shifts:
    """Return, for every layer that reads a (clipped) Gaussian, how far its outputs move: one row for all images."""
    graph = ir.load(path).graph
    layers = {}
    for node, axis in place(ir.load(path), scheme, keep_float=keep_float).weights.items():
        source = node.inputs[0]
        if source is not None and source.name in ranges and (found := _clipped(source)):
            layers[node] = (axis, *found)
    moments = _moments(path, graph, sorted({name for _, name, _ in layers.values()}), batches)
    shifts: Shifts = {}
    for node, (axis, name, clip) in layers.items():
        source = node.inputs[0]
        if source is None or source.shape is None or name not in moments:
            continue
        exact = mean_of(*moments[name], clip)
        rounded = rounded_mean(*moments[name], clip, ranges[source.name or ""], scheme)
        sides = [int(side) if isinstance(side, int) else 1 for side in source.shape]
        share = mean_read(node, np.ones(sides, np.float32))
        along = [-1, *[1] * (share.ndim - 1)]
        means = ((share * exact.reshape(along))[None], (share * rounded.reshape(along))[None])
        shift = output_shift(node, *both_weights(node, axis, weights), means)
        if shift is not None:
            shifts[key_of(node)] = shift
    return shifts


def mean_of(mean: Floats, deviation: Floats, clip: Range) -> Floats:
    """Return E[clip(z)] of Gaussian z, channel by channel."""
    low, high = ((end - mean) / deviation for end in clip)
    inside = mean * (_cumulative(high) - _cumulative(low)) + deviation * (_density(low) - _density(high))
    below = 0.0 if math.isinf(clip[0]) else clip[0] * _cumulative(low)
    above = 0.0 if math.isinf(clip[1]) else clip[1] * (1 - _cumulative(high))
    return np.asarray(inside + below + above)


def rounded_mean(mean: Floats, deviation: Floats, clip: Range, span: Range, scheme: QuantScheme) -> Floats:
    """Return E[Q(clip(z))] of Gaussian z: the lowest value, and a step for every threshold that z exceeds."""
    scale, _, low, high = qdq.grid(span, scheme)
    step = float(scale)
    total = np.full(mean.shape, low * step)
    for integer in range(low, high):
        threshold = (integer + 0.5) * step
        if threshold < clip[0]:
            total += step
        elif threshold < clip[1]:
            total += step * (1 - _cumulative((threshold - mean) / deviation))
    return total


def _clipped(source: ir.Value) -> tuple[str, Range] | None:
    """Return the Gaussian tensor that `source` is, or is a clipped copy of, and the ends of the clip."""
    producer = source.producer()
    clip = (-math.inf, math.inf)
    if producer is not None and producer.op_type in FUSED:
        ends = [ir.convenience.get_const_tensor(v) if v is not None else None for v in producer.inputs[1:3]]
        found = [None if end is None else float(end.numpy().reshape(())) for end in (*ends, None, None)[:2]]
        low, high = (0.0, None) if producer.op_type == "Relu" else found
        clip = (-math.inf if low is None else low, math.inf if high is None else high)
        source = producer.inputs[0] if producer.inputs[0] is not None else source
        producer = source.producer()
    return (source.name or "", clip) if producer is not None and producer.op_type in _GAUSSIAN else None


def _moments(
    path: Path, graph: ir.Graph, names: Sequence[str], batches: Iterable[NDArray[np.float32]]
) -> dict[str, tuple[Floats, Floats]]:
    """Return the mean and the standard deviation of every channel of the tensors named."""
    axes, sums, count = channel_axes(graph), dict[str, Floats](), 0
    for values in activations(path, names, batches):
        count += 1
        for name, array in values.items():
            other = tuple(i for i in range(array.ndim) if i != axes.get(name, 1) % array.ndim)
            seen = np.stack([array.mean(other, dtype=np.float64), np.square(array).mean(other, dtype=np.float64)])
            sums[name] = sums.get(name, np.zeros_like(seen)) + seen
    found = {}
    for name, total in sums.items():
        mean, square = total / count
        found[name] = (mean, np.sqrt(np.maximum(square - mean**2, 1e-12 * np.maximum(square, 1e-12))))
    return found


def _cumulative(z: Floats) -> Floats:
    erf = np.asarray([math.erf(value) for value in (z / math.sqrt(2)).reshape(-1)])
    return np.asarray(0.5 * (1 + erf.reshape(z.shape)))


def _density(z: Floats) -> Floats:
    return np.asarray(np.exp(-0.5 * np.square(z)) / math.sqrt(2 * math.pi))
