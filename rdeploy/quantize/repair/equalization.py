"""Equalization: scale channels between layers so that one range serves them all, which changes nothing in float.

A tensor has one scale for all its channels; where their sizes differ by a hundred, the small ones are all noise. A factor s
per channel goes into the layer that writes it (its rows times s) and out of the layers that read it (their columns over s);
per-channel weights absorb the first at no cost, the second may cost a reader's rows resolution, and a depthwise reader
nothing (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; across whole
residual streams and the value path of attention as well). For each group of tensors the factors are searched over
s = r^-a w^-b, r the channel's range and w its largest weight, for the least noise expected of activations and weights.

A LayerNormalization is such a writer, through its scale and its bias, and can move a channel besides (`shift`): then every
channel lies around 0 (RepQ-ViT's reparameterization, ICCV 2023; MPTQ-ViT's SmoothQuant with bias).

A Clip at 6 passes a factor only where nothing is clipped: a channel that may reach the limit, or was never seen above 0, keeps
the factor 1, and the others grow up to where they might. How much more than was seen another image may hold is tried out: the
margin grows until factors found on half of the images leave the other half as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize import heap
from rdeploy.quantize.channels import Group, clip_limit, groups
from rdeploy.quantize.importance import channel_weights
from rdeploy.quantize.judge import Images, sqnr_db
from rdeploy.quantize.placement import place, weight_of
from rdeploy.quantize.ranges import float_outputs
from rdeploy.quantize.repair import attention, centering, extremes, folding
from rdeploy.quantize.repair.extremes import Channels, Seen, channels_of
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
_POWERS, _FINER = (0.0, 0.25, 0.5, 0.75, 1.0), (-0.125, 0.0, 0.125)
_LARGEST = 64.0
"""No channel is scaled by more than this against another: what is that small is dead, and would only fill its range."""
_MARGINS = (2.0, 4.0, 8.0, 16.0, np.inf)
_CLEAR_DB = 45.0
"""Clipping at the limits is to leave this at the outputs: INT8 is at 20 to 40 dB."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the noise depends on: which tensors are quantized, in how many steps from end to end, and the largest weight.

    `margin`: how many times what was seen a channel may hold that is not to reach the limit of a Clip.
    """

    quantized: frozenset[str]
    symmetric: bool
    weight_max: int
    activation_bits: int = 8
    margin: float = _MARGINS[0]


def apply(model: ir.Model, seen: dict[str, Channels], rules: Rules) -> int:
    """Scale the channels of `model`, an FP32 graph without Q/DQ pairs, in place; return how many groups were scaled."""
    important = channel_weights(model.graph)
    changed = 0
    for group in groups(model.graph):
        known = {name: seen[name] for name in group.tensors if name in seen}
        if len(known) < len(group.tensors) or not any(name in rules.quantized for name in known):
            continue
        taken = centering.find(model.graph, group, _middles(known, rules))
        if taken is not None:
            known = {name: channels.moved(taken[name]) for name, channels in known.items()}
        factors = _search(group, known, important, rules)
        if taken is None and np.ptp(factors) < 1e-6:
            continue
        folding.scale(model.graph, group, factors)
        if taken is not None:
            centering.apply(model.graph, group, {name: shift * factors for name, shift in taken.items()})
        changed += 1
    return changed


def _middles(seen: dict[str, Channels], rules: Rules) -> dict[str, Floats]:
    """Return the middle of each channel of the tensors that are quantized."""
    return {n: (channels.low + channels.high) / 2 for n, channels in seen.items() if n in rules.quantized}


def _search(group: Group, seen: dict[str, Channels], important: dict[str, Floats], rules: Rules) -> Floats:
    """Return the factors with the least noise expected, on a coarse grid and then around it; all ones are among them."""
    quantized = {name: channels for name, channels in seen.items() if name in rules.quantized}
    noise = _Noise(group, quantized, important, rules)
    spans = np.stack([_size(c) / max(_size(c).max(), 1e-30) for c in quantized.values()])
    largest = np.max([_columns(n, group.size).max(axis=0) for n in group.readers], axis=0)
    room = _room(group, seen, rules.margin)
    best, least = np.ones(group.size), noise.of(np.ones(group.size))
    size = spans.max(axis=0)
    reach = np.where(size > 0, np.maximum(size, 1 / _LARGEST), 1.0)
    weight = np.maximum(largest / max(largest.max(), 1e-30), 1 / _LARGEST)
    tried: Iterable[tuple[float, ...]] = itertools.product(_POWERS, _POWERS)
    for _ in range(2):
        at = (0.0, 0.0)
        for a, b in tried:
            factors = _allowed(reach**-a * weight**b, room)
            if (found := noise.of(factors)) < least * 0.999:
                best, least, at = factors, found, (a, b)
        tried = itertools.product(*([max(0.0, power + by) for by in _FINER] for power in at))
    return best


def _allowed(factors: Floats, room: Floats) -> Floats:
    """Return the factors with those of clipped channels at 1, the others relative to them and within their room."""
    clipped = room == 1.0
    one = factors[clipped].mean() if clipped.any() else factors.min()
    return np.asarray(np.where(clipped, 1.0, np.clip(factors / one, 1 / _LARGEST, room)))


def _size(channels: Channels) -> Floats:
    size: Floats = np.maximum(channels.high, -channels.low).clip(0)
    return size


def _room(group: Group, seen: dict[str, Channels], margin: float) -> Floats:
    """Return the largest factor of each channel: up to where its largest value might be clipped, exactly 1 where it is."""
    limit = min((clip_limit(node) for node in group.clips), default=np.inf)
    if not np.isfinite(limit):
        return np.full(group.size, _LARGEST)
    reach = np.max([channels.reach(margin) for channels in seen.values()], axis=0)
    return np.asarray(np.where(reach < limit, limit / np.maximum(reach, limit / _LARGEST), 1.0))


class _Noise:
    """Expected noise of a group's quantized tensors and of its readers' weights, as a function of the factors."""

    def __init__(self, group: Group, seen: dict[str, Channels], important: dict[str, Floats], rules: Rules) -> None:
        self._rules, self._tensors = rules, []
        for name, channels in seen.items():
            readers = [n for n in group.readers if n.inputs[0] is not None and n.inputs[0].name == name]
            gains = [_gain(n, group.size, important) for n in readers]
            matter = np.sum(gains, axis=0) if gains else important.get(name, np.ones(group.size))
            self._tensors.append((channels, readers, np.broadcast_to(matter, (group.size,)), important))
        self._size = group.size
        self._base = [sum(parts) for parts in self._parts(np.ones(group.size))]

    def of(self, factors: Floats) -> float:
        """Return the noise relative to factors of 1, summed over the tensors."""
        found = self._parts(factors)
        return float(sum(sum(parts) / max(base, 1e-300) for parts, base in zip(found, self._base)))

    def _parts(self, factors: Floats) -> list[tuple[float, float]]:
        parts = []
        for channels, readers, matter, important in self._tensors:
            step = self._step(channels, factors)
            rounding = step**2 * float((matter / np.square(factors)).sum())
            weights = 0.0
            for node in readers:
                columns = _columns(node, self._size)
                if len(columns) > 1:  # a depthwise reader's scales are per channel: they absorb the factor
                    steps = (columns / factors).max(axis=1) / self._rules.weight_max
                    outputs = _importance(node, important, len(columns))
                    weights += float((outputs * steps**2).sum() * (channels.mean_square * np.square(factors)).sum())
            parts.append((rounding, weights))
        return parts

    def _step(self, channels: Channels, factors: Floats) -> float:
        low, high = float((channels.low * factors).min()), float((channels.high * factors).max())
        steps: int = 2**self._rules.activation_bits - 1
        if self._rules.symmetric:
            return max(high, -low) / (steps // 2)
        return (max(high, 0.0) - min(low, 0.0)) / steps


def _columns(node: ir.Node, size: int) -> Floats:
    """Return the largest magnitude of the weights by (output, input channel); one row where each input has its own outputs."""
    weight = weight_of(node)
    values = (
        np.abs(np.asarray(weight.const_value.numpy(), np.float64)) if weight and weight.const_value else np.ones((1, 1))
    )
    if node.op_type == "MatMul":
        return np.asarray(values.T)
    flat = values.reshape(*values.shape[:2], -1).max(axis=2)
    if flat.shape[1] == size:
        return np.asarray(flat)
    return np.asarray(flat.reshape(size // flat.shape[1], -1, flat.shape[1]).max(axis=1).reshape(1, -1))


def _gain(node: ir.Node, size: int, important: dict[str, Floats]) -> Floats:
    """Return how much of an input channel's noise power reaches the layer's outputs, weighed by what they matter."""
    weight = weight_of(node)
    values = np.asarray(weight.const_value.numpy(), np.float64) if weight and weight.const_value else np.ones((1, 1))
    if node.op_type == "MatMul":
        return np.asarray(np.square(values) @ _importance(node, important, values.shape[1]))
    squared = np.square(values).reshape(*values.shape[:2], -1).sum(axis=2)
    outputs = _importance(node, important, len(squared))
    groups_ = size // squared.shape[1]
    return np.asarray((squared * outputs[:, None]).reshape(groups_, -1, squared.shape[1]).sum(axis=1).reshape(-1))


def _importance(node: ir.Node, important: dict[str, Floats], size: int) -> Floats:
    found = important.get(node.outputs[0].name or "")
    return found if found is not None and found.size == size else np.ones(size)


def rules(model: ir.Model, schemes: Sequence[QuantScheme]) -> Rules:
    """Return what the noise of a graph depends on when it is to serve all of `schemes`."""
    quantized: set[str] = set()
    for scheme in schemes:
        quantized |= set(place(model, scheme).reads)
    return Rules(
        frozenset(quantized),
        symmetric=all(scheme.activations == "int8" for scheme in schemes),
        weight_max=min(scheme.weight_max for scheme in schemes),
        activation_bits=min(scheme.activation_bits for scheme in schemes),
    )


def equalize(path: Path, out: Path, schemes: Sequence[QuantScheme], batches: Sequence[NDArray[np.float32]]) -> int:
    """Write the graph at `path` with its channels scaled for all `schemes` to `out`; return how many groups were scaled."""
    first, second = batches[::2], batches[1::2] or batches
    seen = extremes.observe(path, first)
    heap.release(0)
    given = _with_margin(path, seen, schemes, second)
    others = extremes.observe(path, second)
    heap.release(0)
    model = ir.load(path)
    changed = apply(model, channels_of({name: one.with_others(others[name]) for name, one in seen.items()}), given)
    if any(scheme.products != "none" or scheme.integer_attention for scheme in schemes):
        changed += attention.scale(model, path, batches)
    if changed:
        ir.save(model, out)
    return changed


def _with_margin(path: Path, seen: dict[str, Seen], schemes: Sequence[QuantScheme], others: Images) -> Rules:
    """Return the rules with the least margin that leaves what the network makes of `others` as it is."""
    model = ir.load(path)
    given = rules(model, schemes)
    if not any(np.isfinite(clip_limit(node)) for group in groups(model.graph) for node in group.clips):
        return given
    exact = list(float_outputs(path, others))
    for margin in _MARGINS:
        given = replace(given, margin=margin)
        model = ir.load(path)
        apply(model, channels_of(seen), given)
        if sqnr_db(exact, float_outputs(model, others)) >= _CLEAR_DB:
            break
    return given
