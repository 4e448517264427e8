"""Gradients of a network's output by what lies inside it: a graph and names of tensors go in, values and gradients come out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported
from rdeploy.quantize import ranges
from rdeploy.quantize.adjoint import moves, rules, windows
from rdeploy.quantize.adjoint.tape import Shape, Tape

RULES = {**rules.RULES, **windows.RULES, **moves.RULES}
OLDEST = 16
"""The opset in which values can be added up where they came from (ScatterElements)."""
_SEED = "::seed"
Felt = dict[str, tuple[NDArray[Any], NDArray[Any]]]
"""Values of an activation and the gradient at each of them, by name."""


class Network:
    """A graph in FP32 (no Q/DQ pairs) with its backward nodes, in one ONNX Runtime session; `image` is (1, C, H, W).

    Raises:
        Unsupported: an operator has no gradient here (the message names it), or ONNX Runtime does not take it.
    """

    def __init__(self, path: Path, names: Collection[str], image: NDArray[np.float32]) -> None:
        model = ir.load(path)
        if (opset := model.graph.opset_imports.get("", 0)) < OLDEST:
            raise Unsupported(f"gradients begin at opset {OLDEST}, the graph has {opset}", stage="quantize")
        self._feed = model.graph.inputs[0].name or ""
        self._seeds, self._gradients = append(model.graph, names, unknown(path, model.graph, image))
        self._values = [name for name in self._gradients if name != self._feed]
        with refusals():
            self._session = ranges.session_of(model)
            self._probe(image, np.random.default_rng(0))

    def gradients(self, image: NDArray[np.float32], probes: int, generator: np.random.Generator) -> Iterator[Felt]:
        """Yield, `probes` times, values of the tensors named and the gradient of `signs . output` by each.

        What the output does not depend on is left out.
        """
        for _ in range(probes):
            yield self._probe(image, generator)  # nothing of it is kept here: two probes are as large as a network

    def _probe(self, image: NDArray[np.float32], generator: np.random.Generator) -> Felt:
        seeds = {name: signs(generator, shape) for name, shape in self._seeds.items()}
        found = self._session.run([*self._values, *self._gradients.values()], {self._feed: image, **seeds})
        values = {**dict(zip(self._values, found)), self._feed: image}
        slopes = zip(self._gradients, found[len(self._values) :])
        return {name: (values[name], np.nan_to_num(slope, copy=False)) for name, slope in slopes}


@contextmanager
def refusals() -> Iterator[None]:
    """Turn whatever ONNX Runtime raises into `Unsupported`: what gradients are wanted for can be done without them."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unsupported(f"ONNX Runtime takes no gradients of it: {reason}", stage="quantize") from error


def signs(generator: np.random.Generator, shape: Shape) -> NDArray[np.float32]:
    """Return random signs."""
    return np.asarray(2 * generator.integers(0, 2, shape) - 1, np.float32)


class Back(NamedTuple):
    """Backward nodes: where more can be written, the new inputs' shapes, and the gradient of every tensor that is felt."""

    tape: Tape
    seeds: dict[str, Shape]
    gradients: dict[ir.Value, ir.Value]


def append(
    graph: ir.Graph, names: Collection[str], shapes: dict[str, Shape]
) -> tuple[dict[str, Shape], dict[str, str]]:
    """Write the backward nodes of `graph` behind its own, in place, with the tensors named and their gradients as outputs.

    Return the shapes of the new inputs, one for each output (what it is multiplied with: `differentiable.Graph.gradients`), and
    the names of the gradients by those of the tensors.
    """
    tape, seeds, gradients = backward(graph, names, shapes)
    reached = {value.name or "": gradient for value, gradient in gradients.items() if value.name in names}
    inner = [value for value in gradients if value.name in reached and not value.is_graph_input()]
    graph.outputs.clear()
    graph.outputs.extend([*inner, *_apart(tape, reached)])
    return seeds, dict(zip(reached, (value.name or "" for value in graph.outputs[len(inner) :])))


def backward(graph: ir.Graph, names: Collection[str], shapes: dict[str, Shape]) -> Back:
    """Write the backward nodes of `graph` behind its own, in place, for the activations and weights named.

    Raises:
        Unsupported: the output depends on none of them, or an operator has no gradient here.
    """
    nodes, tape = list(graph), Tape(graph, shapes)
    felt = _felt(graph, names)
    gradients: dict[ir.Value, ir.Value] = {}
    seeds = _seed(tape, felt, gradients)
    for node in reversed(nodes):
        incoming = [gradients.get(output) for output in node.outputs]
        wanted = [i for i, value in enumerate(node.inputs) if value in felt]
        if not wanted or all(gradient is None for gradient in incoming):
            continue
        for index in wanted:
            value, found = node.inputs[index], _back(tape, node, index, incoming)
            if value is not None and found is not None:
                known = gradients.get(value)
                gradients[value] = found if known is None else tape.op("Add", known, found)
    if not any(value.name in names for value in gradients):
        raise Unsupported("the network's output has no gradient: it is the same whatever the values", stage="quantize")
    return Back(tape, seeds, gradients)


def _apart(tape: Tape, reached: dict[str, ir.Value]) -> list[ir.Value]:
    """Return the gradients, each a value of its own: two tensors may share one (a sum of both)."""
    made = []
    for gradient in reached.values():
        own = tape.op("Identity", gradient)
        own.dtype = ir.DataType.FLOAT
        made.append(own)
    return made


def _back(tape: Tape, node: ir.Node, index: int, gradients: list[ir.Value | None]) -> ir.Value | None:
    """Return the gradient of one of the node's inputs.

    Raises:
        Unsupported: the operator, or this use of it, has no rule; the message names the layer.
    """
    try:
        if node.op_type == "Split":
            return moves.split(tape, node, gradients)
        if any(gradient is not None for gradient in gradients[1:]):
            raise Unsupported("what it writes beside its first output", stage="quantize")
        if node.op_type not in RULES:
            raise Unsupported(f"no rule for {node.op_type}", stage="quantize")
        gradient = gradients[0]
        return None if gradient is None else RULES[node.op_type](tape, node, index, gradient)
    except Unsupported as error:
        raise Unsupported(
            f"layer {node.name!r} ({node.op_type}) has no gradient in rdeploy: {error}", stage="quantize"
        ) from error


def _felt(graph: ir.Graph, names: Collection[str]) -> set[ir.Value]:
    """Return the tensors named and all that depends on them."""
    found = {value for value in (*graph.inputs, *graph.initializers.values()) if value.name in names}
    for node in graph:
        downstream = any(value in found for value in node.inputs)
        found.update(output for output in node.outputs if downstream or output.name in names)
    return found


def _seed(tape: Tape, felt: set[ir.Value], gradients: dict[ir.Value, ir.Value]) -> dict[str, Shape]:
    """Begin at the outputs: one as it is, several ones brought to one size, without what is not finite."""
    graph = tape.graph
    outputs = [value for value in graph.outputs if value.dtype in (None, ir.DataType.FLOAT)]
    if not outputs:
        raise Unsupported("the network's outputs have no gradient: all are integers", stage="quantize")
    seeds = {}
    for index, output in enumerate(outputs):
        shape = tape.shape(output)
        seed = ir.Value(name=f"{_SEED}{index}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(seed)
        seeds[seed.name or ""] = shape
        if output in felt:
            gradients[output] = _brought_to_size(tape, output, seed) if len(outputs) > 1 else seed
    return seeds


def _brought_to_size(tape: Tape, output: ir.Value, seed: ir.Value) -> ir.Value:
    zero = np.zeros(1, np.float32)
    lost = tape.op("Or", tape.op("IsInf", output), tape.op("IsNaN", output))
    size = tape.op("ReduceL2", tape.op("Where", lost, zero, output), keepdims=0)
    return tape.op("Where", lost, zero, tape.op("Div", seed, tape.op("Max", size, np.full(1, 1e-30, np.float32))))


def unknown(path: Path, graph: ir.Graph, image: NDArray[np.float32]) -> dict[str, Shape]:
    """Return the shapes that the graph does not tell, as they are for this image."""
    values = [value for node in graph for value in node.outputs if value.name]
    names = [v.name or "" for v in values if v.shape is None or not all(isinstance(side, int) for side in v.shape)]
    if not names:
        return {}
    return {name: array.shape for name, array in next(ranges.activations(path, names, [image])).items()}
