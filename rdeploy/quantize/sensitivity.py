"""Which layers make the error of an INT8 graph: the graph and some images go in, every layer's share of the error comes out.

One pass, forward and backward, over each image. With e the error that a Q/DQ pair makes in what a layer reads, and J the
derivative of the network's output by it, the output is off by J e; for random signs v, E (v . J e)^2 = |J e|^2, and v . J e
is the dot product of e with the gradient of v . output (the diagonal of a Gauss-Newton Hessian, with the errors measured,
not assumed). A weight's rounding error is taken as uniform within its step: its part is sum g^2 step^2 / 12.
What a layer's corrected bias takes back (the mean error of what it reads, and the mean of what its wrong weights see) is left
out. Errors of different layers are taken as uncorrelated; those that fall away together with one layer are added up first.
Where there are no gradients, a layer's share is its own error next to the size of what it reads and of its weights.
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

from rdeploy import spread
from rdeploy.errors import Unsupported
from rdeploy.graph import cost
from rdeploy.quantize import explain
from rdeploy.quantize.placement import place
from rdeploy.types import QuantScheme

log = logging.getLogger(__name__)

IMAGES, PROBES = 24, 2
"""How many images and directions the mean is taken over: the share of a layer is then known to about a fifth of itself."""

Site = tuple[str, int]
Owned = dict[str, tuple[frozenset[Site], frozenset[str]]]
"""By layer, the quantized reads and the weighted layers that are gone when it is left in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """A layer that could be left in float: its share of the output's error, and of the MACs."""

    layer: str
    noise: float
    macs: float


def rank(fp32: Path, int8: Path, scheme: QuantScheme, images: Sequence[NDArray[np.float32]]) -> tuple[Sensitivity, ...]:
    """Return every layer that can fall back to float, the one that makes most of the error first; the shares add up to 1."""
    layers = owned_sites(ir.load(fp32), scheme)
    chosen = [images[i] for i in spread.evenly(len(images), IMAGES)]
    try:
        noise = _noise(ir.load(int8).graph, layers, chosen)
    except (ImportError, RuntimeError, Unsupported) as error:
        log.info("layers are ranked by their own error, without gradients: %s", error)
        noise = _own_noise(int8, layers, chosen)
    macs = {layer.name: layer.macs for layer in cost.layers(fp32)}
    total, work = sum(noise.values()) or 1.0, sum(macs.values()) or 1
    found = [Sensitivity(layer=n, noise=noise[n] / total, macs=macs.get(n, 0) / work) for n in layers]
    return tuple(sorted(found, key=lambda one: (-one.noise, one.layer)))


def owned_sites(model: ir.Model, scheme: QuantScheme) -> Owned:
    """Return, for every layer, the quantized reads and the weighted layers that are gone when it is left in float."""
    reads, weights = _placed(model, scheme, ())
    names = [name for name in dict.fromkeys([*weights, *(site[0] for site in reads)]) if name]
    found = {}
    for name in names:
        left_reads, left_weights = _placed(model, scheme, (name,))
        gone = frozenset(reads) - frozenset(left_reads), frozenset(weights) - frozenset(left_weights)
        if any(gone):
            found[name] = gone
    return found


def _placed(model: ir.Model, scheme: QuantScheme, keep_float: Sequence[str]) -> tuple[list[Site], list[str]]:
    placement = place(model, scheme, keep_float=keep_float)
    reads = [(node.name or "", index) for readers in placement.reads.values() for node, index in readers]
    return reads, [node.name or "" for node in placement.weights]


def _own_noise(int8: Path, layers: Owned, images: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Return, for each layer, how large the errors of its reads and weights are next to what they are errors of."""
    graph = ir.load(int8).graph
    tensors = {t.name: 10 ** (-t.own_db / 10) for t in explain.explain(int8, images) if t.own_db is not None}
    nodes = {node.name or "": node for node in graph}
    held = {name: _weight_noise(nodes[name], steps) for name, steps in _weight_steps(graph).items()}
    return {
        layer: sum(tensors.get(_rounded(nodes[name], index), 0.0) for name, index in sites)
        + sum(held.get(name, 0.0) for name in weights)
        for layer, (sites, weights) in layers.items()
    }


def _rounded(node: ir.Node, index: int) -> str:
    """Return the name of the tensor that this input is behind a Q/DQ pair."""
    value = node.inputs[index]
    for _ in range(2):
        producer = value.producer() if value is not None else None
        value = producer.inputs[0] if producer is not None else value
    return (value.name if value is not None else "") or ""


def _weight_noise(node: ir.Node, steps: NDArray[np.float32]) -> float:
    integers = node.inputs[1].producer().inputs[0].const_value.numpy()
    return float(np.square(steps).mean() / 12 / max(np.square(integers * steps).mean(), 1e-30))


def _noise(graph: ir.Graph, layers: Owned, images: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Return the mean square error that each layer makes at the output."""
    import torch

    from rdeploy.quantize import differentiable

    network = differentiable.Graph(graph)
    steps = {name: torch.from_numpy(step) for name, step in _weight_steps(graph).items()}
    operators = {node.name or "": node.op_type for node in graph}
    errors, inputs = _means(network, images, operators)
    generator = torch.Generator().manual_seed(0)
    totals = dict.fromkeys(layers, 0.0)
    for image in images:
        run = network.run(image)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, run.output.shape, generator=generator) * 2.0 - 1.0
            reads, weights, biases = _gradients(run, signs)
            moved = {site: float((reads[site] * (run.errors[site] - errors.get(site, 0.0))).sum()) for site in reads}
            rounded = {
                name: float(
                    (_centred(operators[name], g, biases.get(name), inputs.get(name)) * steps[name]).square().sum()
                )
                / 12
                for name, g in weights.items()
            }
            for layer, (sites, held) in layers.items():
                square = sum(moved.get(site, 0.0) for site in sites) ** 2
                totals[layer] += square + sum(rounded.get(name, 0.0) for name in held)
    return {layer: total / (len(images) * PROBES) for layer, total in totals.items()}


def _gradients(run: Any, signs: Any) -> tuple[dict[Site, Any], dict[str, Any], dict[str, Any]]:
    """Return the gradients of `signs . output` by the run's leaves, those that the output depends on."""
    from rdeploy.quantize.differentiable import derivatives

    kinds = (run.reads, run.weights, run.biases)
    found = iter(derivatives(run.output, signs, [leaf for kind in kinds for leaf in kind.values()]))
    reads, weights, biases = ({key: g for key, g in zip(kind, found) if g is not None} for kind in kinds)
    return reads, weights, biases


def _centred(operator: str, gradient: Any, bias: Any, means: Any) -> Any:
    """Return a weight's gradient without the part that its bias takes back: a constant times what the layer's mean input is."""
    if bias is None or means is None:
        return gradient
    bias = bias.reshape(-1)
    if operator != "Conv":
        part = means[:, None] * bias[None, :]
        return gradient - (part if part.shape == gradient.shape else part.T)
    per_group = means.reshape(-1, gradient.shape[1])
    mean = per_group.repeat_interleave(len(bias) // len(per_group), dim=0)

    return gradient - (mean * bias[:, None]).reshape(*mean.shape, *[1] * (gradient.dim() - 2))


def _means(
    network: Any, images: Sequence[NDArray[np.float32]], operators: dict[str, str]
) -> tuple[dict[Site, Any], dict[str, Any]]:
    """Return, for the layers whose bias is corrected, the mean error of each channel read and the mean of what is read."""
    import torch

    from rdeploy.quantize.differentiable import CHANNEL_AXIS

    errors: dict[Site, Any] = {}
    inputs: dict[str, Any] = {}
    with torch.no_grad():
        for image in images:
            run = network.run(image)
            for site, error in run.errors.items():
                if (axis := CHANNEL_AXIS.get(operators[site[0]])) is not None:
                    others = tuple(i for i in range(error.dim()) if i != axis % error.dim())
                    errors[site] = errors.get(site, 0.0) + error.mean(dim=others, keepdim=True) / len(images)
            for name, mean in run.means.items():
                inputs[name] = inputs.get(name, 0.0) + mean / len(images)
    return errors, inputs


def _weight_steps(graph: ir.Graph) -> dict[str, NDArray[np.float32]]:
    """Return, by weighted layer, the size of a rounding step of its weight, to be broadcast."""
    found = {}
    for node in graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        producer = weight.producer() if weight is not None else None
        if producer is None or producer.op_type != "DequantizeLinear" or not producer.inputs[0].is_initializer():
            continue
        scale = np.array(producer.inputs[1].const_value.numpy(), np.float32)
        rank, axis = len(producer.inputs[0].shape), producer.attributes["axis"].as_int()
        found[node.name or ""] = scale.reshape([-1 if i == axis % rank and scale.ndim else 1 for i in range(rank)])
    return found
