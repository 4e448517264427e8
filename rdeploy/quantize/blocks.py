"""Find the blocks of a network whose layers are learned together: a graph and its layers go in, where blocks end comes out.

A block is what lies between two cuts where one activation alone is live, found by the graph's structure: a residual block, an
inverted residual, attention or an MLP with the residual stream around it. Where nothing branches, three layers are a block (an
inverted residual that changes the resolution). What has more than `MOST` layers (dense connections, a U-Net) is cut where two
activations are live, or three, and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from rdeploy.quantize import staged
from rdeploy.quantize.placement import after_fused
from rdeploy.quantize.repair import bias_correction

CHAIN, MOST = 3, 8
"""Layers of a block without branches, and of one with branches, at most."""


def ends(graph: ir.Graph, layers: Collection[ir.Node]) -> frozenset[str]:
    """Return the names of the nodes behind which a block ends; every block but the last holds at least one of `layers`."""
    live: dict[ir.Node, int] = {}

    def count(node: ir.Node, values: list[ir.Value]) -> bool:
        live[node] = len(values)
        return False

    staged.split(graph, count)
    found: list[str] = []
    last, held, closed = "", 0, False
    for piece in _pieces(list(graph), live, layers, 1):
        inside = sum(node in layers for node in piece)
        branched = inside > 0 and _branches(piece)
        if inside and held and (branched or closed or held + inside > CHAIN):
            found.append(last)
            held, closed = 0, False
        last, held, closed = piece[-1].name or "", held + inside, closed or branched
    return frozenset(found)


def _pieces(
    nodes: Sequence[ir.Node], live: dict[ir.Node, int], layers: Collection[ir.Node], most: int
) -> list[list[ir.Node]]:
    """Cut `nodes` wherever at most `most` activations are live; what is too long is cut where one more is."""
    pieces: list[list[ir.Node]] = [[]]
    for node in nodes:
        pieces[-1].append(node)
        if live.get(node, 0) <= most and not _continued(node) and node is not nodes[-1]:
            pieces.append([])
    widest = max((live.get(node, 0) for node in nodes), default=0)
    found = []
    for piece in pieces:
        long = sum(node in layers for node in piece) > MOST and most < widest
        found += _pieces(piece, live, layers, most + 1) if long else [piece]
    return found


def _continued(node: ir.Node) -> bool:
    """Whether an activation function or a bias of its own, which alone reads it, follows a node."""
    if after_fused(node) is not node.outputs[0]:
        return True
    held = bias_correction.holder(node) if node.op_type == "MatMul" else None
    return held is not None


def _branches(piece: Sequence[ir.Node]) -> bool:
    """Whether what comes into a piece, or a value inside it, is read by several of its nodes."""
    inside = set(piece)
    values = {value for node in piece for value in node.inputs if value is not None and not value.is_initializer()}
    return any(len({user for user, _ in value.uses()} & inside) > 1 for value in values)
