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

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import spread
from rdeploy.errors import Unsupported
from rdeploy.graph import cost
from rdeploy.quantize import explain, scores
from rdeploy.quantize.adjoint import responses
from rdeploy.quantize.adjoint.responses import Site
from rdeploy.quantize.placement import place
from rdeploy.types import QuantScheme

log = logging.getLogger(__name__)

IMAGES, PROBES = 24, 2
"""How many images and directions the mean is taken over: the share of a layer is then known to about a fifth of itself."""

Owned = dict[str, tuple[frozenset[Site], frozenset[str]]]
"""By layer, the quantized reads and the weighted layers that are gone when it is left in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """A layer that could be left in float: its share of the output's error, and of the MACs."""

    layer: str
    noise: float
    macs: float


def rank(fp32: Path, int8: Path, scheme: QuantScheme, images: Sequence[NDArray[np.float32]]) -> tuple[Sensitivity, ...]:
    """Return every layer that can fall back to float, the one that makes most of the error first; the shares add up to 1.

    A layer that makes none is left out: there is nothing to gain.
    """
    layers = owned_sites(ir.load(fp32), scores.widest(scheme))
    chosen = [images[i] for i in spread.evenly(len(images), IMAGES)]
    try:
        noise = _noise(int8, layers, chosen)
    except Unsupported as error:
        log.info("layers are ranked by their own error, without gradients: %s", error)
        noise = _own_noise(int8, layers, chosen)
    macs = {layer.name: layer.macs for layer in cost.layers(fp32)}
    total, work = sum(noise.values()) or 1.0, sum(macs.values()) or 1
    found = [Sensitivity(layer=n, noise=noise[n] / total, macs=macs.get(n, 0) / work) for n in layers if noise[n] > 0]
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
    held = {name: _weight_noise(nodes[name], steps) for name, steps in responses.weight_steps(graph).items()}
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


def _noise(int8: Path, layers: Owned, images: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """Return the mean square error that each layer makes at the output."""
    totals = dict.fromkeys(layers, 0.0)
    for found in responses.probe(int8, images, PROBES):
        for layer, (sites, held) in layers.items():
            square = sum(found.reads.get(site, 0.0) for site in sites) ** 2
            totals[layer] += square + sum(found.weights.get(name, 0.0) for name in held)
    return {layer: total / (len(images) * PROBES) for layer, total in totals.items()}
