"""Error feedback: round the weights layer by layer, each for the network as the layers before it have become.

Two copies of the graph run side by side over some calibration images, in segments: the exact one, and one with the rounded
activations and the weights rounded so far. A layer sees samples of what the second gives it; `rounding.solve` chooses its
integers and its scales, and its bias takes the mean error against the first, over all places. With the weights rounded to
nearest (`nearest`) only the biases are corrected, each for what the layers before it do now: NNCF's and Nagel's sequential
(empirical) bias correction. Where an image is between two segments its state is kept in a file, all of them together no more than
`BUDGET_BYTES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import InvariantError
from rdeploy.quantize import heap, qdq, rounding, staged
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.ranges import Range
from rdeploy.quantize.repair import bias_correction
from rdeploy.quantize.sampling import Sampler
from rdeploy.quantize.spooled import Spooled
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
Images = Sequence[NDArray[np.float32]]
BUDGET_BYTES = 160 << 20
_TOGETHER = 4
"""So many images' samples are multiplied at once: the product is added to a matrix as large as the layer is wide, squared."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """What came out: the weights by name, what to add to each layer's outputs by their name, how many layers were solved."""

    weights: dict[str, qdq.QuantizedWeight]
    shifts: dict[str, Floats]
    solved: int


@dataclass(slots=True)
class _Copy:
    """One of the two graphs, cut where the other one is cut, with the layers to solve."""

    placement: Placement
    segments: list[staged.Stage]

    def layers(self, at: int) -> list[ir.Node]:
        """Return the weighted layers of a segment, in order."""
        return [node for node in self.segments[at].nodes if node in self.placement.weights]


def solve(
    path: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    images: Images,
    *,
    nearest: Mapping[str, qdq.QuantizedWeight] | None = None,
    keep_float: Sequence[str] = (),
) -> Rounded:
    """Choose integers for every weight that `place` quantizes in the FP32 graph at `path`.

    With `nearest`, by the name of the weight, the integers are given and only the biases are found.
    """
    heap.release(path.stat().st_size)
    exact, rounded = _copies(path, ranges, scheme, len(images), keep_float)
    names = exact.segments[0].reads
    known = made = Spooled([image] for image in images)
    found = Rounded({}, {}, 0)
    solved = 0
    for at, (truth, segment) in enumerate(zip(exact.segments, rounded.segments)):
        layers = list(zip(rounded.layers(at), exact.layers(at)))
        spans = [ranges.get(_read_name(node).removesuffix(staged.QUANTIZED)) for _, node in layers]
        known, seen = _watch(truth, [node for _, node in layers], spans, _states(names, known))
        for (node, original), read in zip(layers, seen):
            sample = Sampler(node, 0 if nearest else len(images))
            moments, means = _moments(_before(segment, node), node, sample, _states(names, made))
            given = nearest.get(_weight_name(node)) if nearest else None
            values = given or _solve(node, rounded.placement.weights[node], moments, scheme)
            _settle(found, rounded.placement.weights[node], (node, original), values, (np.stack(read), means))
            solved += moments is not None
        if at < len(rounded.segments) - 1:
            made = Spooled([after[n] for n in segment.writes] for after in map(segment.run, _states(names, made)))
        names = segment.writes
        truth.forget()
        segment.forget()
        _drop_weights(node for node, _ in layers)
        heap.release(0)
    return Rounded(found.weights, found.shifts, solved)


def _drop_weights(nodes: Iterable[ir.Node]) -> None:
    """Let go of weights in float that nothing behind reads."""
    for node in nodes:
        value = node.inputs[1]
        if value is not None and len(value.uses()) == 1:
            value.const_value = None


def _states(names: Sequence[str], rows: Spooled) -> Iterator[staged.State]:
    """Yield the state of one image after the other."""
    return (dict(zip(names, row)) for row in rows)


def _copies(
    path: Path, ranges: dict[str, Range], scheme: QuantScheme, images: int, keep_float: Sequence[str]
) -> tuple[_Copy, _Copy]:
    """Load the graph twice, as it is and with rounded activations; both are cut behind the same nodes."""
    proto = onnx.load(path)
    model, other = ir.from_proto(proto), ir.from_proto(proto)  # of one copy of the weights
    exact, rounded = (place(copy, scheme, keep_float=keep_float) for copy in (model, other))
    staged.separate_reads(exact)
    staged.separate_reads(rounded, ranges, scheme)
    ends: set[str] = set()
    layers = 0

    def cut(node: ir.Node, live: list[ir.Value]) -> bool:
        nonlocal layers
        layers += node in exact.weights
        if not layers or staged.state_bytes(live) * 2 * images > BUDGET_BYTES:
            return False
        layers = 0
        ends.add(node.name or "")
        return True

    first = _Copy(exact, staged.split(model.graph, cut))
    return first, _Copy(rounded, staged.split(other.graph, lambda node, _: node.name in ends))


def _watch(
    segment: staged.Stage, layers: Sequence[ir.Node], spans: Sequence[Range | None], states: Iterable[staged.State]
) -> tuple[Spooled, list[list[Floats]]]:
    """Run the exact segment; return the states behind it, and the means of what every layer's weights read."""
    names = [_read_name(node) for node in layers]
    means: list[list[Floats]] = [[] for _ in layers]

    def rows() -> Iterator[list[NDArray[np.float32]]]:
        for state in states:
            values = state | segment.run(state, sorted(set(names) - set(state)))
            for node, found, name, span in zip(layers, means, names, spans):
                held = values[name] if span is None else np.clip(values[name], *span)
                found.append(bias_correction.mean_read(node, held))
            yield [values[name] for name in segment.writes]

    return Spooled(rows()), means


def _before(segment: staged.Stage, node: ir.Node) -> staged.Stage:
    """Return the part of a segment that computes what `node` reads."""
    name = _read_name(node)
    needed, nodes = {name}, []
    for earlier in reversed(segment.nodes[: segment.nodes.index(node)]):
        if any(value.name in needed for value in earlier.outputs):
            nodes.append(earlier)
            needed.update(value.name or "" for value in earlier.inputs if value is not None)
    return staged.Stage(nodes[::-1], tuple(n for n in segment.reads if n in needed), (name,))


def _moments(
    part: staged.Stage, node: ir.Node, sample: Sampler, states: Iterable[staged.State]
) -> tuple[rounding.Moments | None, Floats]:
    """Return the moments of what a layer reads in the rounded network (None where it is not sampled), and its means.

    An image with more power than most counts as one of them.
    """
    means: list[Floats] = []
    powers: list[float] = []

    def samples() -> Iterator[list[NDArray[np.float32]]]:
        for index, state in enumerate(states):
            read = part.run(state)[_read_name(node)]
            means.append(bias_correction.mean_read(node, read))
            seen = sample(read, index)
            powers.append(float(np.square(seen).mean()) if seen.size else 0.0)
            yield [seen]

    kept = Spooled(samples())
    if not sample.inputs:
        return None, np.stack(means)
    moments = rounding.Moments.empty(sample.groups, sample.inputs)
    weights = np.sqrt(np.minimum(1.0, np.median(powers) / np.maximum(powers, 1e-30)))
    weighed = (seen * weight for weight, (seen,) in zip(weights.astype(np.float32), kept))
    while some := list(itertools.islice(weighed, _TOGETHER)):
        moments.add(np.concatenate(some, axis=1))
    return moments, np.stack(means)


def _solve(
    node: ir.Node,
    axis: int,
    moments: rounding.Moments | None,
    scheme: QuantScheme,
) -> qdq.QuantizedWeight:
    """Choose the integers and the scales of one layer."""
    weight = _weight(node)
    if moments is None:
        return qdq.quantize_weight(weight.astype(np.float32), axis, scheme.weight_max)
    rows = _rows(node, weight, len(moments.sum))
    biased = bias_correction.holder(node) is not None
    integers, scales = rounding.solve(rows, moments, scheme.weight_max, biased=biased)
    return _unrows(node, integers, weight.shape), scales.reshape(-1).astype(np.float32)


def _settle(
    found: Rounded,
    axis: int,
    nodes: tuple[ir.Node, ir.Node],
    values: qdq.QuantizedWeight,
    means: tuple[Floats, Floats],
) -> None:
    """Let a layer compute with its integers and take back its mean error, and keep both in `found`."""
    node, truth = nodes
    held = bias_correction.dequantized(values, axis)
    rows = bias_correction.output_shift(node, _weight(truth), held, means)
    shift = None if rows is None else bias_correction.trimmed(rows)
    value = node.inputs[1]
    if value is not None:
        value.const_value = ir.tensor(held.astype(np.float32), name=value.name)
    found.weights[_weight_name(node)] = values
    graph = node.graph
    if shift is not None and isinstance(graph, ir.Graph) and bias_correction.subtract(graph, node, shift):
        found.shifts[bias_correction.key_of(node)] = -shift


def _weight_name(node: ir.Node) -> str:
    value = node.inputs[1]
    return (value.name or "") if value is not None else ""


def _weight(node: ir.Node) -> Floats:
    value = node.inputs[1]
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise InvariantError(f"quantize: layer {node.name!r} has no constant weights")
    return np.asarray(tensor.numpy().astype(np.float64))


def _read_name(node: ir.Node) -> str:
    value = node.inputs[0]
    return (value.name or "") if value is not None else ""


def _rows(node: ir.Node, weight: Floats, groups: int) -> Floats:
    """Return the weights as (groups, outputs, inputs)."""
    return weight.T[None] if node.op_type == "MatMul" else weight.reshape(groups, weight.shape[0] // groups, -1)


def _unrows(node: ir.Node, rows: NDArray[np.int8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    return np.ascontiguousarray(rows[0].T if node.op_type == "MatMul" else rows.reshape(shape))


def apply(model: ir.Model, placement: Placement, found: Rounded) -> dict[str, qdq.QuantizedWeight]:
    """Add what was found to the biases of `model`, the FP32 graph that was solved, in place; return its integers."""
    for node in placement.weights:
        shift = found.shifts.get(bias_correction.key_of(node))
        if shift is not None and shift.size:
            bias_correction.subtract(model.graph, node, -shift)
    return found.weights
