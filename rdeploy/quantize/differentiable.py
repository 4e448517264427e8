"""Gradients by PyTorch, for graphs of which ONNX Runtime has none (`adjoint`): a graph and an image go in, gradients come out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rdeploy.errors import Unsupported
from rdeploy.quantize.operators.evaluation import OPERATORS, evaluate


class Graph:
    """A graph without Q/DQ pairs, evaluated on one image after the other; constants are turned into tensors once.

    `names` are the activations whose values and gradients are asked for.
    """

    def __init__(self, graph: ir.Graph, names: Collection[str]) -> None:
        self._graph, self._names = graph, names
        self._constants = {
            value: torch.from_numpy(np.array(value.const_value.numpy()))
            for value in graph.initializers.values()
            if value.const_value is not None
        }
        if missing := sorted({n.op_type for n in graph if n.op_type not in (*OPERATORS, "Split", "Shape")}):
            raise Unsupported(f"rdeploy has no gradient of {', '.join(missing)}", stage="quantize")

    def gradients(
        self, image: np.ndarray[Any, Any], probes: int, generator: np.random.Generator
    ) -> Iterator[dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]:
        """Yield, `probes` times, values of the activations named and the gradient of `signs . output` by each.

        What the output does not depend on is left out.
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
            found = _derivatives(output, signs, list(wanted.values()), again=probe < probes - 1)
            yield {
                name: (tensor.detach().numpy(), gradient.nan_to_num(0.0, 0.0, 0.0).numpy())
                for (name, tensor), gradient in zip(wanted.items(), found)
                if gradient is not None
            }


def _derivatives(output: Tensor, signs: Tensor, leaves: Sequence[Tensor], *, again: bool) -> tuple[Tensor | None, ...]:
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
