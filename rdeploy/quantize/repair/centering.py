"""Centering: let every channel of a tensor lie around 0, so that the channels need no wider range than one of them.

What a layer without an activation function writes (the bottlenecks of inverted residuals and the stream that they add up, a
LayerNormalization) lies around another number in every channel, and one range has to hold them all. Each writer's bias gives
up a number per channel, which the biases of the layers that read it give back: exact in float where no reader pads its input
with zeros, and free at run time (RepQ-ViT's reparameterization, ICCV 2023, and MPTQ-ViT's SmoothQuant with bias do so behind
a LayerNormalization). Through a sum the numbers add up; those of all writers of a residual stream are chosen together. The
values of attention are left where they are: moving them cost a ViT-S 1 dB.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.graph import simplify
from rdeploy.quantize.channels import Group
from rdeploy.quantize.placement import channel_axis, is_constant, weight_of
from rdeploy.quantize.repair import bias_correction, folding

Floats = NDArray[np.float64]
Shares = dict[str, Floats]
"""How often each writer of a group is in each of its tensors: (writers,) by the name of the tensor."""


def find(graph: ir.Graph, group: Group, middles: Mapping[str, Floats]) -> dict[str, Floats] | None:
    """Return what to subtract from every tensor of a group so that those in `middles` lie around 0, by name.

    None where a reader could not give it back. Writers that are summed up are solved for together (least squares).
    """
    if not group.moved or not middles or not _can_shift(group):
        return None
    shares = _shares(graph, group)
    if shares is None:
        return None
    names = list(middles)
    wanted = np.stack([middles[name] for name in names])
    by_writer = np.linalg.lstsq(np.stack([shares[name] for name in names]), wanted, rcond=None)[0]
    return {name: share @ by_writer for name, share in shares.items()}


def apply(graph: ir.Graph, group: Group, by: Mapping[str, Floats]) -> None:
    """Subtract `by` from the channels of the group's tensors, and give it back through the biases of what reads them."""
    for node in group.writers:
        move(graph, node, by[node.outputs[0].name or ""])
    for node in group.readers:
        source = node.inputs[0]
        taken = by[(source.name or "") if source is not None else ""]
        bias_correction.subtract(graph, node, -through(node, taken))
    simplify.drop_unused_initializers(graph)


def _can_shift(group: Group) -> bool:
    return all(_gives(node) for node in group.writers) and all(takes(node) for node in group.readers)


def _gives(node: ir.Node) -> bool:
    """Whether the node adds a constant to each channel that it writes, or could."""
    return node.op_type in ("LayerNormalization", "Mul") or bias_correction.holder(node) is not None


def takes(node: ir.Node) -> bool:
    """Whether the layer can have a bias and never reads a zero that was put in: padding is not moved along."""
    if weight_of(node) is None or bias_correction.holder(node) is None:
        return False
    padded = "pads" in node.attributes and any(node.attributes["pads"].as_ints())
    automatic = "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("NOTSET", "VALID")
    return node.op_type in ("Gemm", "MatMul") or (node.op_type == "Conv" and not padded and not automatic)


def _shares(graph: ir.Graph, group: Group) -> Shares | None:
    """Follow the writers through the group; None where a tensor's parts along another axis hold different sums of them."""
    found: Shares = {}
    for node in graph:
        names = [value.name for value in node.outputs if value.name in group.tensors]
        if not names:
            continue
        if node in group.writers:
            share = np.array([float(node is writer) for writer in group.writers])
        else:
            read = [v for v in node.inputs if v is not None and not is_constant(v)]
            parts = [found[v.name] for v in read if v.name in found]
            if not parts or (node.op_type == "Concat" and any((part != parts[0]).any() for part in parts)):
                return None
            share = np.sum(parts, axis=0) if node.op_type == "Add" else parts[0]
        found.update(dict.fromkeys((name or "" for name in names), share))
    return found


def move(graph: ir.Graph, node: ir.Node, by: Floats) -> None:
    """Subtract `by` from the channels that a layer, a LayerNormalization or the pair of smoothing writes."""
    if node.op_type == "Mul":  # of smoothing: the Add in front of it moves its channels
        add = node.inputs[0].producer() if node.inputs[0] is not None else None
        if add is not None:
            folding.replace(graph, add, 1, folding.array(add.inputs[1]) - by / folding.array(node.inputs[1]))
    elif node.op_type == "LayerNormalization":
        held = (
            folding.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(by.size)
        )
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        folding.replace(graph, node, 2, held - by)
    else:
        bias_correction.subtract(graph, node, by)


def through(node: ir.Node, taken: Floats, weight: Floats | None = None) -> Floats:
    """Return what a layer makes of `taken` in every place that it reads, with its own weights when none are given."""
    weight = folding.array(weight_of(node)) if weight is None else weight
    if node.op_type == "MatMul":
        return np.asarray(taken @ weight)
    if node.op_type == "Gemm":
        return np.asarray(taken @ (weight.T if channel_axis(node) == 0 else weight))
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    groups = taken.size // taps.shape[1]
    rows = taps.reshape(groups, -1, taps.shape[1])
    return np.asarray(np.einsum("goi,gi->go", rows, taken.reshape(groups, -1)).reshape(-1))
