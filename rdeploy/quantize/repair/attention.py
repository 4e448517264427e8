"""Queries and keys: scale each channel of the one against the other's, so that one range serves all heads; exact in float.

A product of queries and keys is a sum over channels, and q k = (q s) (k / s): the Linear layers that write them take the
factors in, through weights and bias. Their channels are found by sending the numbers of a layer's outputs through whatever
only moves values (splitting q, k and v of one layer, cutting out heads and windows); a channel that anything else reads, or that
meets several others, is left as it is. As in `equalization`, the factors are searched over s = q^-a k^b, q and k the largest
values of a channel, for the least noise expected in the products.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize.placement import is_constant, multiplies_activations, weight_of
from rdeploy.quantize.ranges import activations
from rdeploy.quantize.repair import folding

Floats = NDArray[np.float64]
Channels = NDArray[np.int64]
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST = 64.0
"""No channel is scaled by more than this: what is that small is dead."""


@dataclass(slots=True, eq=False)
class _Layer:
    """A Linear layer, the Adds of its bias with the constant's place, and who reads which of its channels in the end."""

    node: ir.Node
    biases: list[tuple[ir.Node, int]] = field(default_factory=list)
    readers: list[tuple[ir.Node | None, int, Channels]] = field(default_factory=list)

    def alone(self, reader: ir.Node, index: int, channels: Channels) -> bool:
        """Whether nobody else reads these channels."""
        others = [ids for node, i, ids in self.readers if (node, i) != (reader, index)]
        return not any(np.isin(channels, ids).any() for ids in others)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product of queries and keys: the layers that write them, and the `pairs` (n, 2) of their channels that meet.

    `at` says of every channel of the two activations (..., channels) which pair it belongs to.
    """

    node: ir.Node
    layers: tuple[_Layer, _Layer]
    pairs: Channels
    at: Channels

    @property
    def names(self) -> tuple[str, str]:
        """The names of queries and keys as the product reads them."""
        queries, keys = (value.name if value is not None else None for value in self.node.inputs[:2])
        return queries or "", keys or ""


def products(graph: ir.Graph) -> list[Product]:
    """Return the products whose factors' channels can be scaled against each other."""
    read: dict[tuple[ir.Node, int], tuple[_Layer, Channels]] = {}
    for node in graph:
        if node.op_type != "MatMul" or (weight := weight_of(node)) is None or len(weight.shape or ()) != 2:
            continue
        if (layer := _followed(node)) is None:
            continue
        for reader, index, ids in layer.readers:
            if reader is not None and multiplies_activations(reader):
                read[reader, index] = layer, ids
    found = (_paired(node, read[node, 0], read[node, 1]) for node, i in read if i == 0 and (node, 1) in read)
    return [product for product in found if product is not None]


def _paired(node: ir.Node, first: tuple[_Layer, Channels], second: tuple[_Layer, Channels]) -> Product | None:
    queries, keys = first[1], np.swapaxes(second[1], -1, -2)
    of_first, of_second = queries[..., 0, :], keys[..., 0, :]
    mixed = (queries != queries[..., :1, :]).any() or (keys != keys[..., :1, :]).any()
    if mixed or of_first.shape != of_second.shape:
        return None
    pairs, at = np.unique(np.stack([of_first.reshape(-1), of_second.reshape(-1)], 1), axis=0, return_inverse=True)
    single = all(len(np.unique(side)) == len(pairs) for side in pairs.T)
    if not single or not first[0].alone(node, 0, pairs[:, 0]) or not second[0].alone(node, 1, pairs[:, 1]):
        return None
    return Product(node, (first[0], second[0]), pairs, at.reshape(of_first.shape))


def _followed(node: ir.Node) -> _Layer | None:
    """Send the numbers of a layer's outputs to all who read them."""
    output = node.outputs[0]
    shape = _sides(output)
    if shape is None:
        return None
    layer = _Layer(node)
    waiting = [(output, np.broadcast_to(np.arange(shape[-1]), shape))]
    while waiting:
        value, ids = waiting.pop()
        if value.is_graph_output():
            layer.readers.append((None, 0, ids))
        for reader, index in value.uses():
            moved = _moved(reader, index, ids)
            if value is output and _adds_bias(reader, index, shape[-1]):
                layer.biases.append((reader, 1 - index))
                moved = [(reader.outputs[0], ids)]
            if moved is None:
                layer.readers.append((reader, index, ids))
            else:
                waiting += moved
    return layer


def _adds_bias(node: ir.Node, index: int, channels: int) -> bool:
    other = node.inputs[1 - index] if node.op_type == "Add" else None
    return other is not None and is_constant(other) and tuple(other.shape or ()) == (channels,)


def _moved(node: ir.Node, index: int, ids: Channels) -> list[tuple[ir.Value, Channels]] | None:
    """Return where a node that only moves values (or scales all alike) takes them, None for every other node."""
    output, others = node.outputs[0], [v for i, v in enumerate(node.inputs) if i != index and v is not None]
    if (index and node.op_type != "Mul") or not all(is_constant(value) for value in others):
        return None
    if node.op_type in ("Identity", "Dropout"):
        return [(output, ids)]
    if node.op_type in ("Mul", "Div"):
        return [(output, ids)] if all(_sides(v) in ((), (1,)) for v in others) else None
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return [(output, ids.transpose(node.attributes["perm"].as_ints()))]
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if node.op_type == "Gather" and others[0].const_value is not None:
        return [(output, ids.take(np.asarray(others[0].const_value.numpy(), np.int64), axis))]
    if node.op_type == "Slice":
        return _cut_out(node, ids)
    shapes = [_sides(value) for value in node.outputs]
    if any(shape is None for shape in shapes):
        return None
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        return [(output, ids.reshape(shapes[0] or ()))]
    if node.op_type == "Split":
        ends = np.cumsum([(shape or ids.shape)[axis] for shape in shapes])[:-1]
        return list(zip(node.outputs, np.split(ids, ends.tolist(), axis)))
    return None


def _cut_out(node: ir.Node, ids: Channels) -> list[tuple[ir.Value, Channels]] | None:
    constants = [value.const_value for value in node.inputs[1:] if value is not None]
    if len(constants) != len(node.inputs) - 1 or any(constant is None for constant in constants):
        return None
    starts, ends, *rest = ([int(number) for number in c.numpy().reshape(-1)] for c in constants if c is not None)
    axes = rest[0] if rest else [*range(len(starts))]
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    where = [slice(None)] * ids.ndim
    for axis, start, end, by in zip(axes, starts, ends, steps):
        where[axis] = slice(start, end, by)
    return [(node.outputs[0], ids[tuple(where)])] if min(steps) > 0 else None


def _sides(value: ir.Value) -> tuple[int, ...] | None:
    sides = tuple(value.shape) if value.shape is not None else (None,)
    return (
        tuple(int(side) for side in sides if isinstance(side, int)) if all(isinstance(s, int) for s in sides) else None
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of every pair's channel of an activation: the largest magnitude, averaged over images, and the mean square."""

    largest: Floats
    square: Floats


def scale(model: ir.Model, path: Path, batches: Iterable[NDArray[np.float32]]) -> int:
    """Scale queries against keys in `model`, whose values of them are those of the graph at `path`; return how many products."""
    found = products(model.graph)
    changed = 0
    for product, (queries, keys) in zip(found, _observed(found, path, batches)):
        factors = _search(queries, keys)
        changed += bool(np.ptp(factors) > 1e-6)
        for layer, channels, by in zip(product.layers, product.pairs.T, (factors, 1 / factors)):
            folding.scale_outputs(model.graph, layer.node, layer.biases, _at(layer, channels, by))
    return changed


def _at(layer: _Layer, channels: Channels, by: Floats) -> Floats:
    weight = weight_of(layer.node)
    factors = np.ones(int(weight.shape[1]) if weight is not None and weight.shape is not None else 0)
    factors[channels] = by
    return factors


def _observed(
    found: list[Product], path: Path, batches: Iterable[NDArray[np.float32]]
) -> Iterator[tuple[_Seen, _Seen]]:
    sums: dict[str, tuple[Floats, Floats]] = {}
    count = 0
    names = sorted({name for product in found for name in product.names})
    for values in activations(path, names, batches) if names else ():
        count += 1
        for product in found:
            for name, tokens in zip(product.names, (-2, -1)):
                largest, square = sums.setdefault(name, (np.zeros(len(product.pairs)), np.zeros(len(product.pairs))))
                peak = np.zeros(len(product.pairs))
                np.maximum.at(peak, product.at, np.abs(values[name]).max(tokens))
                largest += peak
                np.add.at(square, product.at, np.square(values[name], dtype=np.float64).mean(tokens))
    for product in found:
        queries, keys = (_Seen(*(total / max(count, 1) for total in sums[name])) for name in product.names)
        yield queries, keys


def _search(queries: _Seen, keys: _Seen) -> Floats:
    """Return the factors of the queries with the least noise expected in the products; all ones are among the candidates."""

    def noise(factors: Floats) -> float:
        of_queries = (queries.largest * factors).max() ** 2 * (keys.square / factors**2).sum()
        of_keys = (keys.largest / factors).max() ** 2 * (queries.square * factors**2).sum()
        return float(of_queries + of_keys)

    best, least = np.ones(queries.largest.size), noise(np.ones(queries.largest.size))
    large, small = (np.maximum(seen.largest, seen.largest.max() / _LARGEST).clip(1e-30) for seen in (queries, keys))
    for a, b in itertools.product(_POWERS, _POWERS):
        factors = large**-a * small**b
        factors = np.clip(factors / np.exp(np.log(factors).mean()), 1 / _LARGEST, _LARGEST)
        if (found := noise(factors)) < least * 0.999:
            best, least = factors, found
    return best
