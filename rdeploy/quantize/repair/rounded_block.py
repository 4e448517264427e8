"""A block of layers in PyTorch whose rounding is learned: nodes, integers and images go in, integers and biases come out.

A weight lies between two integers, the one that it is given and that on the other side of its real value. Gradient descent on
what the block puts out moves it, and a growing push sends it to one of the two. (Weights that are rounded in the forward
direction, with straight-through gradients, swing between their integers and end on either.) Activations are
rounded in the forward direction; beyond the ends of their ranges no gradient passes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdeploy.errors import Unsupported
from rdeploy.quantize import qdq, staged
from rdeploy.quantize.operators.evaluation import evaluate
from rdeploy.quantize.repair import bias_correction

Read = Callable[[int], tuple[staged.State, Sequence[NDArray[np.float32]]]]
"""By image: the activations in front of the block, and what its outputs should be."""
STEPS, RATE = 100, 0.03
"""Of Adam, in steps of the integers; the rate falls to zero along half a cosine."""
WARM, DECIDED, PUSH = 0.2, 0.95, 64.0
"""After this part of the steps weights are pushed to their integers, harder with every step; an undecided weight then counts as
so many times its share of the error that the block began with."""
BATCH, BATCH_VALUES = 16, 400_000
"""Images of a step, and so many values of the block's largest activation in all of them: they stay in the processor's caches."""
HELD_OUT = 4
"""One image in so many decides whether what was learned is kept."""
LEAN = 0.8
"""Where a weight starts: so far towards the integer it is given, the rest towards its real value."""
_REACH = 16.0
"""A bias moves as the weight of one more input would, which is so many steps of the others large."""


@dataclass(slots=True)
class Layer:
    """The rounding of one layer: `weights`, in steps of `scale`, between `lower` and the integers above; `shift` of its bias.

    The shift is in `unit`, None where no bias can take it.
    """

    weights: Tensor
    lower: Tensor
    scale: Tensor
    shift: Tensor | None
    unit: Tensor

    def decided(self) -> Tensor:
        """Return every weight on the nearer of its two integers."""
        return self.lower + (self.weights.detach() - self.lower > 0.5)

    def undecided(self) -> Tensor:
        """Return the sum over the weights of 1 half-way between their integers and 0 on them."""
        above = self.weights - self.lower
        return (4 * above * (1 - above)).sum()

    def settle(self, share: float) -> None:
        """Bring the weights back between their integers, and that share of them which is nearest to theirs onto them."""
        with torch.no_grad():
            self.weights.clamp_(self.lower, self.lower + 1)
            decided = self.decided()
            count = int(share * self.weights.numel())
            if count:
                off = (self.weights - decided).abs()
                self.weights.copy_(torch.where(off <= off.flatten().kthvalue(count).values, decided, self.weights))

    def integers(self) -> NDArray[np.int8]:
        """Return what the weights became."""
        return np.asarray(self.decided().cpu().numpy().astype(np.int8))

    def added(self) -> NDArray[np.float64] | None:
        """Return what is added to the layer's outputs, None where no bias can take it."""
        return None if self.shift is None else (self.shift * self.unit).detach().cpu().numpy().astype(np.float64)


def begin(node: ir.Node, axis: int, wanted: Any, start: qdq.QuantizedWeight, most: int) -> Layer:
    """Return the rounding of a layer between the integers of `start` and those next to them, towards the weights `wanted`."""
    integers, scales = start
    along = [-1 if i == axis else 1 for i in range(integers.ndim)]
    ideal, first = wanted / scales.reshape(along), integers.astype(np.float32)
    lower = np.clip(np.where(first <= ideal, first, first - 1), -most, most - 1)
    weights = lower + LEAN * np.clip(first - lower, 0, 1) + (1 - LEAN) * np.clip(ideal - lower, 0, 1)
    held, low, scale = (
        torch.tensor(a, dtype=torch.float32, device=_device()) for a in (weights, lower, scales.reshape(along))
    )
    takes = bias_correction.holder(node) is not None
    pair = node.inputs[0].producer() if node.inputs[0] is not None else None
    step = float(_array(pair.inputs[1])) if pair is not None and pair.op_type == "DequantizeLinear" else 1.0
    shift = torch.zeros(scales.size, device=_device(), requires_grad=True) if takes else None
    return Layer(held.requires_grad_(), low, scale, shift, scale.reshape(-1) * step * _REACH)


class Block:
    """Some nodes of the rounded graph in order; `outputs` are the activations that are compared with those in float.

    Constants are turned into tensors once.
    """

    def __init__(self, nodes: Sequence[ir.Node], layers: Mapping[ir.Node, Layer], outputs: Sequence[str]) -> None:
        self.layers = dict(layers)
        self._nodes, self._outputs = list(nodes), tuple(outputs)
        self._biases = {held: layer for node, layer in layers.items() if (held := bias_correction.holder(node))}
        read = {value for node in nodes for value in node.inputs if value is not None and value.const_value is not None}
        self.largest = max(staged.state_bytes([value]) // 4 for node in nodes for value in node.outputs)
        """How many values the largest activation of one image has."""
        self._constants = {value.name or "": _constant(value) for value in read}

    def __call__(self, state: Mapping[str, Tensor], *, decided: bool = True) -> list[Tensor]:
        """Return the outputs for the activations that come in, by name, with weights on their integers or in between.

        Raises:
            Unsupported: an operator has no gradient in rdeploy.
        """
        values = {**self._constants, **state}
        weights = {n: (one.decided() if decided else one.weights) * one.scale for n, one in self.layers.items()}
        for node in self._nodes:
            inputs = [values.get(value.name or "") if value is not None else None for value in node.inputs]
            if node in weights:
                inputs[1] = weights[node]
            self._add_shift(node, inputs)
            if node.op_type == "QuantizeLinear":
                found = inputs[:1]  # rounded by the DequantizeLinear behind it
            elif node.op_type == "DequantizeLinear":
                found = [_round(*inputs)]
            else:
                found = evaluate(node, inputs)
            values.update({value.name or "": result for value, result in zip(node.outputs, found)})
        return [values[name] for name in self._outputs]

    def _add_shift(self, node: ir.Node, inputs: list[Any]) -> None:
        for index in range(max(3, len(inputs))):
            layer = self._biases.get((node, index))
            if layer is None or layer.shift is None:
                continue
            inputs += [None] * (index + 1 - len(inputs))
            added = layer.shift * layer.unit
            inputs[index] = added if inputs[index] is None else inputs[index] + added.reshape(inputs[index].shape)

    def leaves(self) -> Iterator[Tensor]:
        """Yield what is learned: the weights and the biases of every layer."""
        for layer in self.layers.values():
            yield layer.weights
            if layer.shift is not None:
                yield layer.shift


def learn(block: Block, images: int, read: Read) -> bool:
    """Learn the block's rounding and biases; return whether its error fell on the images that are held out.

    Every image counts by the error that it began with: where few carry large values, what ranges cut off would be all of the
    sum, and weights would take it back at the expense of the others.

    Raises:
        Unsupported: an operator has no gradient in rdeploy.
    """
    held = list(range(0, images, HELD_OUT))
    seen = [i for i in range(images) if i % HELD_OUT] or held
    with torch.no_grad():
        before = torch.cat([_errors(block, [row], read) for row in range(images)])
    if not bool((before > 0).all() and before.isfinite().all()):
        return False
    size = BATCH_VALUES // max(block.largest, 1) if _takes_batches(block, images, read) else 1
    size = max(1, min(BATCH, size, len(seen)))
    optimizer = torch.optim.Adam(block.leaves(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = np.random.default_rng(0)
    weights = sum(layer.weights.numel() for layer in block.layers.values())
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = generator.choice(seen, size, replace=False).tolist()
        loss = (_errors(block, rows, read, decided=False) / before[rows]).mean()
        push = PUSH * max(0.0, step / STEPS - WARM) / weights
        (loss + push * sum(layer.undecided() for layer in block.layers.values())).backward()
        optimizer.step()
        schedule.step()
        for layer in block.layers.values():
            layer.settle(min(1.0, max(0.0, (step + 1) / STEPS - WARM) / (DECIDED - WARM)))
    with torch.no_grad():
        after = torch.cat([_errors(block, [row], read) for row in held])
    return bool((after / before[held]).mean() < 1)


def _errors(block: Block, rows: Sequence[int], read: Read, *, decided: bool = True) -> Tensor:
    """Return the mean squared error of the block's outputs on each of some images, every output by its own power."""
    pairs = [read(row) for row in rows]
    state = {name: _stacked([one[name] for one, _ in pairs]) for name in pairs[0][0]}
    targets = [_stacked(list(column)) for column in zip(*(wanted for _, wanted in pairs))]
    both = [
        (y.reshape(len(rows), -1), t.reshape(len(rows), -1)) for y, t in zip(block(state, decided=decided), targets)
    ]
    off = [(y - t).square().mean(dim=1) / t.square().mean(dim=1).clamp(min=1e-20) for y, t in both]
    return torch.stack(off).sum(dim=0)


def _takes_batches(block: Block, images: int, read: Read) -> bool:
    """Whether the block computes of two images at once what it does of each: shapes that hold a batch of 1 do not."""
    if images < 2:
        return False
    states = [read(i)[0] for i in (0, 1)]
    with torch.no_grad():
        apart = [block({name: _stacked([array]) for name, array in state.items()}) for state in states]
        try:
            together = block({name: _stacked([state[name] for state in states]) for name in states[0]})
        except Unsupported:
            return False
    expected = [torch.cat(pair) for pair in zip(*apart)]
    return all(y.shape == t.shape and (y - t).norm() <= 0.01 * t.norm() for y, t in zip(together, expected))


def _stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    found = torch.from_numpy(np.concatenate(arrays))
    return found.to(_device()) if found.dtype.is_floating_point else found


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _round(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    low, high = (-128, 127) if zero_point.dtype == torch.int8 else (0, 255)
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)


def _constant(value: ir.Value) -> Tensor:
    found = torch.from_numpy(np.array(_array(value)))
    return found.to(_device()) if found.dtype.is_floating_point else found


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None  # a pair's own constants, or asked for before
    return np.asarray(value.const_value.numpy())
