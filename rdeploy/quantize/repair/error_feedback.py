"""Error feedback: round the weights layer by layer, each for the network as the layers before it have become.

Two copies of the graph run side by side over some calibration images, in segments: the exact one, and one with the rounded
activations and the weights rounded so far. A layer sees samples of both its inputs; `rounding.solve` chooses its integers,
its scales and its bias. Where an image is between two segments its state is kept, and no more of it than `BUDGET_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import InvariantError
from rdeploy.quantize import qdq, rounding, staged
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.ranges import Range
from rdeploy.quantize.repair import bias_correction
from rdeploy.quantize.sampling import Sampler
from rdeploy.types import QuantScheme

Floats = NDArray[np.float64]
Images = Sequence[NDArray[np.float32]]
BUDGET_BYTES = 160 << 20


@dataclass(frozen=True, slots=True)
class Rounded:
    """What came out: the weights by name, what to add to each layer's outputs by node name, how many layers were solved."""

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
    refine: rounding.Refine | None = None,
    keep_float: Sequence[str] = (),
) -> Rounded:
    """Choose integers for every weight that `place` quantizes in the FP32 graph at `path`; `refine` improves each layer's."""
    exact, rounded = _copies(path, ranges, scheme, len(images), keep_float)
    feed = exact.segments[0].reads[0]
    states: list[tuple[staged.State, staged.State]] = [({feed: image}, {feed: image}) for image in images]
    weights: dict[str, qdq.QuantizedWeight] = {}
    shifts: dict[str, Floats] = {}
    solved = 0
    for at, segment in enumerate(rounded.segments):
        layers = rounded.layers(at)
        samplers = [Sampler(node, len(images)) for node in layers]
        seen, after = _watch(exact.segments[at], layers, samplers, [state for state, _ in states])
        for index, (node, sample) in enumerate(zip(layers, samplers)):
            part = _before(segment, node)
            moments = _moments(part, node, sample, seen[index], [state for _, state in states])
            name, values, shift = _solve(node, rounded.placement.weights[node], moments, scheme, refine)
            weights[name] = values
            shifts[node.name or ""] = shift
            solved += moments is not None
            seen[index] = []
        if at < len(rounded.segments) - 1:
            states = [(state, segment.run(old)) for state, (_, old) in zip(after, states)]
        segment.forget()
        exact.segments[at].forget()
    return Rounded(weights, shifts, solved)


def _copies(
    path: Path, ranges: dict[str, Range], scheme: QuantScheme, images: int, keep_float: Sequence[str]
) -> tuple[_Copy, _Copy]:
    """Load the graph twice, as it is and with rounded activations; both are cut behind the same nodes."""
    model, other = ir.load(path), ir.load(path)
    exact, rounded = (place(copy, scheme, keep_float=keep_float) for copy in (model, other))
    staged.separate_reads(exact)
    staged.separate_reads(rounded, ranges, scheme.activations)
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
    segment: staged.Stage, layers: Sequence[ir.Node], samplers: Sequence[Sampler], states: Sequence[staged.State]
) -> tuple[list[list[NDArray[np.float32]]], list[staged.State]]:
    """Run the exact segment; return what every layer reads, sampled, one list an image, and the states behind it."""
    names = [_read_name(node) for node in layers]
    seen: list[list[NDArray[np.float32]]] = [[] for _ in layers]
    after = []
    for index, state in enumerate(states):
        values = state | segment.run(state, sorted(set(names) - set(state)))
        for found, name, sample in zip(seen, names, samplers):
            found.append(sample(values[name], index))
        after.append({name: values[name] for name in segment.writes})
    return seen, after


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
    part: staged.Stage,
    node: ir.Node,
    sample: Sampler,
    exact: Sequence[NDArray[np.float32]],
    states: Sequence[staged.State],
) -> tuple[rounding.Moments, rounding.Moments] | None:
    """Return the moments of what a layer reads in both networks, over every other image and over the rest; None: not sampled."""
    if not sample.inputs:
        return None
    first, second = (rounding.Moments.empty(sample.groups, sample.inputs) for _ in range(2))
    for index, (state, seen) in enumerate(zip(states, exact)):
        (second if index % 2 else first).add(seen, sample(part.run(state)[_read_name(node)], index))
    return first, second


def _solve(
    node: ir.Node,
    axis: int,
    moments: tuple[rounding.Moments, rounding.Moments] | None,
    scheme: QuantScheme,
    refine: rounding.Refine | None,
) -> tuple[str, qdq.QuantizedWeight, Floats]:
    """Choose the integers of one layer, and let it compute with them; return (weight's name, integers, shift)."""
    value = node.inputs[1]
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None:
        raise InvariantError(f"quantize: layer {node.name!r} has no constant weights")
    weight = tensor.numpy().astype(np.float64)
    held = bias_correction.holder(node)
    if moments is None:
        made = qdq.quantize_weight(weight.astype(np.float32), axis, scheme.weight_max)
        shift = np.zeros(0)
    else:
        rows = _rows(node, weight, len(moments[0].exact))
        integers, scales, shift = rounding.solve(
            rows, moments, scheme.weight_max, biased=held is not None, refine=refine
        )
        made = (_unrows(node, integers, weight.shape), scales.reshape(-1).astype(np.float32))
        shift = shift.reshape(-1) if held is not None else np.zeros(0)
    along = [-1 if i == axis else 1 for i in range(weight.ndim)]
    value.const_value = ir.tensor(made[0].astype(np.float32) * made[1].reshape(along), name=value.name)
    if shift.size and isinstance(node.graph, ir.Graph):
        bias_correction.subtract(node.graph, node, -shift)
    return value.name or "", made, shift


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
        shift = found.shifts.get(node.name or "")
        if shift is not None and shift.size:
            bias_correction.subtract(model.graph, node, -shift)
    return found.weights
