"""Evaluate an ONNX graph in PyTorch, so that gradients flow through it: a graph and an image go in, every tensor comes out.

Q/DQ pairs round in the forward direction and are the identity in the backward one (straight through). The leaves, whose
gradients say how much the output minds an error there: what is added to each tensor that a layer reads behind a pair
(`Run.reads`, all zeros), the dequantized weights (`Run.weights`), and what is added to every channel that they make
(`Run.biases`, all zeros).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rdeploy.errors import Unsupported
from rdeploy.quantize.operators.attributes import attribute
from rdeploy.quantize.operators.evaluation import OPERATORS, evaluate

Site = tuple[str, int]
"""A layer's name, and which of its inputs."""


@dataclass(slots=True)
class Run:
    """One evaluation: the output, the leaves, and for every read behind a pair the error that the pair makes.

    `weights`, `biases` and `means` are by the name of the layer; a mean is that of each channel of what the layer reads.
    """

    output: Tensor
    reads: dict[Site, Tensor] = field(default_factory=dict)
    errors: dict[Site, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)


class Graph:
    """A graph that is evaluated on one image after the other; constants are turned into tensors once.

    `names` are the activations whose values and gradients are asked for (`gradients`).
    """

    def __init__(self, graph: ir.Graph, names: Collection[str] = ()) -> None:
        self._graph, self._names = graph, names
        self._constants = {
            value: torch.from_numpy(np.array(value.const_value.numpy()))
            for value in graph.initializers.values()
            if value.const_value is not None
        }
        if missing := sorted({n.op_type for n in graph if n.op_type not in (*OPERATORS, *_PAIR, "Split", "Shape")}):
            raise Unsupported(f"rdeploy has no gradient of {', '.join(missing)}", stage="quantize")

    def run(self, image: np.ndarray[Any, Any]) -> Run:
        """Evaluate the graph on one image (1, C, H, W); the result holds its output, several ones joined (`_joined`)."""
        found = Run(output=torch.empty(0))
        values: dict[ir.Value, Tensor] = {**self._constants, self._graph.inputs[0]: torch.from_numpy(np.array(image))}
        lost: dict[ir.Value, Tensor] = {}
        for node in self._graph:
            if node.op_type == "QuantizeLinear":
                values[node.outputs[0]] = values[_input(node, 0)]  # rounded by the DequantizeLinear behind it
            elif node.op_type == "DequantizeLinear":
                self._dequantize(node, values, lost, found)
            else:
                inputs = [self._read(node, i, values, lost, found) for i in range(len(node.inputs))]
                results = evaluate(node, inputs)
                if (node.name or "") in found.weights:
                    results = [self._with_bias(node, inputs[0], results[0], found)]
                values.update(zip(node.outputs, results))
        found.output = _joined([values[value] for value in self._graph.outputs])
        return found

    def gradients(
        self, image: np.ndarray[Any, Any], probes: int, generator: np.random.Generator
    ) -> Iterator[dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]:
        """Yield, `probes` times, values of the activations named and the gradient of `signs . output` by each.

        The graph holds no Q/DQ pairs. What the output does not depend on is left out.
        """
        values: dict[ir.Value, Tensor] = {**self._constants}
        values[self._graph.inputs[0]] = torch.from_numpy(np.array(image)).requires_grad_()
        for node in self._graph:
            inputs = [None if value is None else values[value] for value in node.inputs]
            values.update(zip(node.outputs, evaluate(node, inputs)))
        output = _joined([values[value] for value in self._graph.outputs])
        wanted = {
            v.name or "": tensor for v, tensor in values.items() if v.name in self._names and tensor.requires_grad
        }
        del values
        for probe in range(probes):
            signs = torch.from_numpy(np.asarray(generator.integers(0, 2, tuple(output.shape)))) * 2.0 - 1.0
            found = derivatives(output, signs, list(wanted.values()), again=probe < probes - 1)
            yield {
                name: (tensor.detach().numpy(), gradient.nan_to_num(0.0, 0.0, 0.0).numpy())
                for (name, tensor), gradient in zip(wanted.items(), found)
                if gradient is not None
            }

    def _dequantize(
        self, node: ir.Node, values: dict[ir.Value, Tensor], lost: dict[ir.Value, Tensor], found: Run
    ) -> None:
        source, output = _input(node, 0), node.outputs[0]
        scale = values[_input(node, 1)].float()
        zero = values[_input(node, 2)].float() if len(node.inputs) > 2 else torch.zeros(())
        if source in self._constants:
            axis = int(attribute(node, "axis", 1))
            shape = [-1 if i == axis % values[source].dim() and scale.dim() else 1 for i in range(values[source].dim())]
            weight = (values[source].float() - zero.reshape(shape)) * scale.reshape(shape)
            values[output] = weight.requires_grad_()
            found.weights.update({user.name or "": weight for user, index in output.uses() if index == 1})
            return
        low, high = (-128, 127) if values[_input(node, 2)].dtype == torch.int8 else (0, 255)
        exact = values[source]
        rounded = (torch.clamp(torch.round(exact.detach() / scale) + zero, low, high) - zero) * scale
        lost[output] = rounded - exact.detach()
        values[output] = exact + lost[output]

    def _with_bias(self, node: ir.Node, x: Tensor | None, y: Tensor, found: Run) -> Tensor:
        if x is None or node.op_type not in CHANNEL_AXIS:
            return y
        axis = CHANNEL_AXIS[node.op_type]
        found.means[node.name or ""] = x.detach().movedim(axis, 0).flatten(1).mean(dim=1)
        shape = [1] * y.dim()
        shape[axis] = y.shape[axis]
        bias = found.biases[node.name or ""] = torch.zeros(shape, requires_grad=True)
        return y + bias

    def _read(
        self, node: ir.Node, index: int, values: dict[ir.Value, Tensor], lost: dict[ir.Value, Tensor], found: Run
    ) -> Tensor | None:
        value = node.inputs[index]
        if value is None:
            return None
        if value not in lost:
            return values[value]
        site = (node.name or "", index)
        found.errors[site] = lost[value]
        found.reads[site] = torch.zeros_like(lost[value], requires_grad=True)
        return values[value] + found.reads[site]


def derivatives(
    output: Tensor, signs: Tensor, leaves: Sequence[Tensor], *, again: bool = True
) -> tuple[Tensor | None, ...]:
    """Return the gradient of `signs . output` by each of the leaves; None for those that it does not depend on.

    Raises:
        Unsupported: the output is the same whatever the values (a class index), or torch has no derivative.
    """
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            (output * signs).sum(), leaves, retain_graph=again, allow_unused=True
        )
    except RuntimeError as error:
        raise Unsupported(
            f"the network's output has no gradient: {str(error).splitlines()[0]}", stage="quantize"
        ) from error
    return found


def _joined(outputs: list[Tensor]) -> Tensor:
    """Return the one output, or all that are numbers in one row, each brought to the same size; -inf of a mask left out."""
    if len(outputs) == 1:
        return outputs[0]
    rows = [value[value.isfinite()] for value in outputs if value.dtype.is_floating_point]
    if not rows:
        raise Unsupported("the network's outputs have no gradient: all are integers", stage="quantize")
    return torch.cat([row / row.detach().norm().clamp(min=1e-30) for row in rows])


_PAIR = ("QuantizeLinear", "DequantizeLinear")
CHANNEL_AXIS = {"Conv": 1, "MatMul": -1, "Gemm": -1}
"""The layers whose bias is corrected, and the channel axis of what they read and write."""


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # an input that its operator cannot be without
    return value
