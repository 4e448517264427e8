"""How much a network's output answers to every rounding in it: an INT8 graph and images go in, squares of errors come out.

Backward nodes are written behind the graph's own, Q/DQ pairs passed straight through, and the graph itself reduces what it
finds to one number for each read behind a pair and each layer with rounded weights: nothing as large as a network leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported
from rdeploy.quantize import ranges
from rdeploy.quantize.adjoint.network import OLDEST, Back, backward, refusals, signs, unknown
from rdeploy.quantize.adjoint.tape import Shape, Tape, number
from rdeploy.quantize.operators.attributes import attribute

Floats = NDArray[np.float32]
Site = tuple[str, int]
"""A layer's name, and which of its inputs."""
CHANNEL_AXIS = {"Conv": 1, "MatMul": -1, "Gemm": -1}
"""The layers whose bias is corrected, and the channel axis of what they read and write."""


@dataclass(frozen=True, slots=True)
class Sites:
    """What is rounded in a graph: reads (what the pair takes, what the layer gets), and layers with their weights' steps."""

    reads: dict[Site, tuple[ir.Value, ir.Value]]
    nodes: dict[str, ir.Node]
    steps: dict[str, Floats]


@dataclass(frozen=True, slots=True)
class Means:
    """By site, the mean error of each channel (to be broadcast); by layer, the mean of each channel that it reads."""

    errors: Mapping[Site, Floats]
    inputs: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Response:
    """One probe: by site the error at `signs . output`, by layer its mean square."""

    reads: dict[Site, float]
    weights: dict[str, float]


def probe(path: Path, images: Sequence[Floats], probes: int) -> Iterator[Response]:
    """Yield what `probes` random directions at the output answer, for each image (1, C, H, W).

    An error is what a pair makes, less its mean in each channel where a corrected bias takes that back; weights are off by as
    much as uniform rounding makes of each, less what a bias takes back of it.

    Raises:
        Unsupported: an operator has no gradient here (the message names it), or ONNX Runtime does not take it.
    """
    means = _means(path, images)
    model = ir.load(path)
    if (opset := model.graph.opset_imports.get("", 0)) < OLDEST:
        raise Unsupported(f"gradients begin at opset {OLDEST}, the graph has {opset}", stage="quantize")
    feed = model.graph.inputs[0].name or ""
    shapes = unknown(path, model.graph, images[0])
    sites = _unrolled(model.graph, shapes)
    felt = [*(seen for _, seen in sites.reads.values()), *map(_weight, sites.nodes.values())]
    back = backward(model.graph, {value.name or "" for value in felt}, shapes)
    reads, weights = _answers(sites, means, back)
    _write_only(model.graph, [*reads.values(), *weights.values()])
    with refusals():
        session = ranges.session_of(model)
    del model, sites, felt
    generator = np.random.default_rng(0)
    for image in images:
        for _ in range(probes):
            seeds = {name: signs(generator, shape) for name, shape in back.seeds.items()}
            with refusals():
                found = [np.nan_to_num(value).item() for value in session.run(None, {feed: image, **seeds})]
            yield Response(dict(zip(reads, found)), dict(zip(weights, found[len(reads) :])))


def weight_steps(graph: ir.Graph) -> dict[str, Floats]:
    """Return, by weighted layer, the size of a rounding step of its weight, to be broadcast."""
    found = {}
    for node in graph:
        producer = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if producer is not None and _holds_constant(producer):
            found[node.name or ""] = _shaped(producer, 1)
    return found


def _unrolled(graph: ir.Graph, shapes: dict[str, Shape]) -> Sites:
    """Give every read behind a pair a value of its own, and every weight its value in float, in place."""
    sites = Sites({}, {}, weight_steps(graph))
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            if (node.name or "") in sites.steps:
                sites.nodes[node.name or ""] = node
            continue
        output = node.outputs[0]
        if _holds_constant(node):
            values = number(node.inputs[0]).astype(np.float32) - (_shaped(node, 2) if len(node.inputs) > 2 else 0)
            held = ir.Value(name=f"{output.name}/float", const_value=ir.tensor(values * _shaped(node, 1)))
            graph.register_initializer(held)
            output.replace_all_uses_with(held)
            continue
        pair = node.inputs[0].producer() if node.inputs[0] is not None else None
        exact = pair.inputs[0] if pair is not None and pair.op_type == "QuantizeLinear" else None
        if exact is None:
            raise Unsupported(f"{node.name!r} dequantizes what was not quantized before it", stage="quantize")
        for reader, index in list(output.uses()):
            own = ir.node("Identity", [output], name=f"{reader.name}/read{index}")
            own.outputs[0].name, own.outputs[0].type, own.outputs[0].shape = own.name, exact.type, exact.shape
            shapes |= {own.name or "": shapes[exact.name or ""]} if exact.name in shapes else {}
            graph.insert_before(reader, own)
            reader.replace_input_with(index, own.outputs[0])
            sites.reads[reader.name or "", index] = exact, own.outputs[0]
    return sites


def _holds_constant(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].const_value is not None


def _shaped(node: ir.Node, index: int) -> Floats:
    """Return a DequantizeLinear's scale or zero point, to be broadcast against what it reads."""
    array, rank = number(node.inputs[index]).astype(np.float32), number(node.inputs[0]).ndim
    axis = int(attribute(node, "axis", 1))
    return array.reshape([-1 if array.ndim and i == axis % rank else 1 for i in range(rank)])


def _weight(node: ir.Node) -> ir.Value:
    value = node.inputs[1]
    assert value is not None  # it was found through its weight
    return value


def _means(path: Path, images: Sequence[Floats]) -> Means:
    """Run the graph forward over the images."""
    model = ir.load(path)
    shapes = unknown(path, model.graph, images[0])
    sites = _unrolled(model.graph, shapes)
    tape = Tape(model.graph, shapes)
    errors, inputs = {}, {}
    for site, (exact, seen) in sites.reads.items():
        reader = next(user for user, _ in seen.uses())
        if (axis := CHANNEL_AXIS.get(reader.op_type)) is not None:
            errors[site] = _mean(tape, tape.op("Sub", seen, exact), tape.shape(seen), axis)
    for name, node in sites.nodes.items():
        if node.op_type in CHANNEL_AXIS and node.inputs[0] is not None:
            inputs[name] = _mean(tape, node.inputs[0], tape.shape(node.inputs[0]), CHANNEL_AXIS[node.op_type])
    if not errors and not inputs:
        return Means({}, {})
    _write_only(model.graph, [*errors.values(), *inputs.values()])
    feed = model.graph.inputs[0].name or ""
    totals = [np.zeros(1, np.float32)] * (len(errors) + len(inputs))
    with refusals():
        session = ranges.session_of(model)
        for image in images:
            totals = [total + value / len(images) for total, value in zip(totals, session.run(None, {feed: image}))]
    return Means(dict(zip(errors, totals)), {n: t.reshape(-1) for n, t in zip(inputs, totals[len(errors) :])})


def _mean(tape: Tape, value: ir.Value, shape: Shape, axis: int) -> ir.Value:
    others = [i for i in range(len(shape)) if i != axis % len(shape)]
    total = tape.op("ReduceSum", value, np.array(others, np.int64), keepdims=1)
    return tape.scaled(total, 1 / math.prod(shape[i] for i in others))


def _write_only(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    graph.outputs.clear()
    for value in values:
        value.dtype = ir.DataType.FLOAT
        graph.outputs.append(value)


def _answers(sites: Sites, means: Means, back: Back) -> tuple[dict[Site, ir.Value], dict[str, ir.Value]]:
    """Write what reduces gradients to one number a site and a layer."""
    tape, gradients = back.tape, back.gradients
    reads, weights = {}, {}
    for site, (exact, seen) in sites.reads.items():
        if (gradient := gradients.get(seen)) is not None:
            error = tape.op("Sub", seen, exact)
            if site in means.errors:
                error = tape.op("Sub", error, means.errors[site])
            reads[site] = tape.op("ReduceSum", tape.op("Mul", gradient, error), keepdims=0)
    for name, node in sites.nodes.items():
        if (gradient := gradients.get(_weight(node))) is not None:
            moved = tape.op("Mul", _centred(tape, node, gradient, gradients, means.inputs.get(name)), sites.steps[name])
            square = tape.op("ReduceSum", tape.op("Mul", moved, moved), keepdims=0)
            weights[name] = tape.scaled(square, 1 / 12)
    return reads, weights


def _centred(
    tape: Tape, node: ir.Node, gradient: ir.Value, gradients: Mapping[ir.Value, ir.Value], means: Floats | None
) -> ir.Value:
    """Return a weight's gradient without the part that its bias takes back: a constant times what the layer's mean input is."""
    output, shape = gradients.get(node.outputs[0]), tape.shape(node.inputs[1])
    if means is None or output is None or (node.op_type != "Conv" and len(shape) != 2):
        return gradient
    sides = tape.shape(node.outputs[0])
    axis = CHANNEL_AXIS[node.op_type] % len(sides)
    total = tape.summed(output, sides, tuple(side if i == axis else 1 for i, side in enumerate(sides)))
    if node.op_type == "Conv":
        rest = (1,) * (len(shape) - 2)
        each = np.repeat(means.reshape(-1, shape[1]), shape[0] * shape[1] // means.size, axis=0)
        return tape.op(
            "Sub", gradient, tape.op("Mul", tape.reshaped(total, (shape[0], 1, *rest)), each.reshape(*shape[:2], *rest))
        )
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return tape.op("Sub", gradient, tape.op("Mul", tape.reshaped(total, (-1, 1)), means.reshape(1, -1)))
    return tape.op("Sub", gradient, tape.op("Mul", tape.reshaped(total, (1, -1)), means.reshape(-1, 1)))
