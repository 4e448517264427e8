"""Adaptive rounding: learn the integers of all the layers of a block at once, by what the block puts out on real images.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, by blocks as in Li et al., "BRECQ",
ICLR 2021: a block of the rounded network reads what the blocks before it give now, and its outputs come as close to those of the
FP32 network as its integers and biases allow. It starts from what another repair has found, scales of weights and ranges of
activations stay, and what was learned is kept where the block's error falls on images that it was not learned on. A block with an
operator that has no gradient in rdeploy keeps its integers. Runs on a GPU where torch has one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import InvariantError, MissingDependency, Unsupported
from rdeploy.quantize import blocks, qdq, staged
from rdeploy.quantize.judge import Repair
from rdeploy.quantize.placement import Placement, place, weight_of
from rdeploy.quantize.ranges import Range
from rdeploy.quantize.repair import bias_correction, error_feedback
from rdeploy.quantize.spooled import Spooled
from rdeploy.types import QuantScheme

log = logging.getLogger(__name__)

Images = Sequence[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class _States:
    """The activations between two blocks, by name, one row an image."""

    names: tuple[str, ...]
    rows: Spooled

    def __getitem__(self, image: int) -> staged.State:
        return dict(zip(self.names, self.rows[image]))

    def behind(self, stage: staged.Stage) -> _States:
        """Run a stage on every image."""
        states = (dict(zip(self.names, row)) for row in self.rows)
        made = (stage.run(state) for state in states)
        return _States(stage.writes, Spooled([state[name] for name in stage.writes] for state in made))


def solve(
    path: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    images: Images,
    start: Repair,
    *,
    keep_float: Sequence[str] = (),
) -> error_feedback.Rounded:
    """Return integers, and shifts of outputs besides those of `start`, for the FP32 graph at `path`; `solved` counts blocks.

    Raises:
        MissingDependency: torch is not installed.
    """
    rounded_block = _torch_side()
    model, other = ir.load(path), ir.load(path)
    exact, rounded = (place(copy, scheme, keep_float=keep_float) for copy in (model, other))
    ends = blocks.ends(model.graph, exact.weights)
    found, kept = error_feedback.Rounded(dict(start(other, rounded)), {}, 0), 0
    wanted = {node: _array(node) for node in rounded.weights}
    for node, axis in rounded.weights.items():
        _hold(node, axis, found.weights)
    staged.separate_reads(exact)
    staged.separate_reads(rounded, ranges, scheme)
    truths, mades = (staged.split(graph, lambda node, _: node.name in ends) for graph in (model.graph, other.graph))
    known = made = _States(truths[0].reads, Spooled([image] for image in images))
    for truth, stage in zip(truths, mades):
        target = known.behind(truth)
        layers = {
            node: rounded_block.begin(node, axis, wanted[node], found.weights[_name(node)], scheme.weight_max)
            for node, axis in rounded.weights.items()
            if node in set(stage.nodes) and not _shared(node)
        }
        if layers and _learned(rounded_block, stage, layers, made, target):
            _keep(found, rounded, layers)
            kept += 1
        made, known = made.behind(stage), target
        truth.forget()
        stage.forget()
    return error_feedback.Rounded(found.weights, found.shifts, kept)


def _learned(
    rounded_block: Any, stage: staged.Stage, layers: dict[ir.Node, Any], made: _States, target: _States
) -> bool:
    """Learn the rounding of a block's layers; return whether its error fell on images that it was not learned on."""
    outputs = _compared(stage, target)
    try:
        block = rounded_block.Block(stage.nodes, layers, outputs)
        return bool(
            outputs and rounded_block.learn(block, len(made.rows), lambda i: (made[i], [target[i][n] for n in outputs]))
        )
    except Unsupported as error:
        log.info("adaptive rounding: integers are kept in front of %s: %s", stage.writes[0], error)
        return False


def _compared(stage: staged.Stage, target: _States) -> tuple[str, ...]:
    """Return the block's outputs in floating point; a copy that is read rounded counts only where it is all that is left."""
    computed = {value.name for node in stage.nodes for value in node.outputs}
    floats = [n for n, array in target[0].items() if n in computed and array.dtype.kind == "f"]
    return tuple(
        n for n in floats if n.removesuffix(staged.QUANTIZED) == n or n.removesuffix(staged.QUANTIZED) not in floats
    )


def _keep(found: error_feedback.Rounded, rounded: Placement, layers: dict[ir.Node, Any]) -> None:
    """Let the layers of a block compute with what was learned, and keep it in `found`."""
    for node, layer in layers.items():
        found.weights[_name(node)] = layer.integers(), found.weights[_name(node)][1]
        _hold(node, rounded.weights[node], found.weights)
        added, graph = layer.added(), node.graph
        if added is not None and isinstance(graph, ir.Graph) and bias_correction.subtract(graph, node, -added):
            found.shifts[bias_correction.key_of(node)] = added


def _hold(node: ir.Node, axis: int, weights: dict[str, qdq.QuantizedWeight]) -> None:
    """Let a layer compute with its integers."""
    value = weight_of(node)
    if value is not None:
        held = bias_correction.dequantized(weights[value.name or ""], axis)
        value.const_value = ir.tensor(held.astype(np.float32), name=value.name)


def _shared(node: ir.Node) -> bool:
    """Whether other layers read a layer's weights as well."""
    value = weight_of(node)
    return value is None or len(list(value.uses())) > 1


def _name(node: ir.Node) -> str:
    value = weight_of(node)
    return (value.name or "") if value is not None else ""


def _array(node: ir.Node) -> NDArray[np.float32]:
    value = weight_of(node)
    if value is None or value.const_value is None:
        raise InvariantError(f"quantize: layer {node.name!r} has no constant weights")
    return np.array(value.const_value.numpy(), np.float32)


def _torch_side() -> Any:
    try:
        from rdeploy.quantize.repair import rounded_block
    except ImportError as error:
        raise MissingDependency("adaptive rounding needs torch", install="pip install 'rdeploy[torch]'") from error
    return rounded_block
