"""Evaluate an ONNX graph in PyTorch, so that gradients flow through it: a graph and an image go in, every tensor comes out.

Q/DQ pairs round in the forward direction and are the identity in the backward one (straight through). The leaves, whose
gradients say how much the output minds an error there: what is added to each tensor that a layer reads behind a pair
(`Run.reads`, all zeros), the dequantized weights (`Run.weights`), and what is added to every channel that they make
(`Run.biases`, all zeros).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from rdeploy.errors import Unsupported

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
    """A graph that is evaluated on one image after the other; constants are turned into tensors once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._constants = {
            value: torch.from_numpy(np.array(value.const_value.numpy()))
            for value in graph.initializers.values()
            if value.const_value is not None
        }
        if missing := sorted({n.op_type for n in graph if n.op_type not in (*OPERATORS, *_PAIR, "Split", "Shape")}):
            raise Unsupported(
                f"mixed precision needs the gradient of {', '.join(missing)}, which rdeploy does not have",
                stage="quantize",
            )

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
                results = _evaluate(node, inputs)
                if (node.name or "") in found.weights:
                    results = [self._with_bias(node, inputs[0], results[0], found)]
                values.update(zip(node.outputs, results))
        found.output = _joined([values[value] for value in self._graph.outputs])
        return found

    def gradients(
        self, image: np.ndarray[Any, Any], names: Collection[str], probes: int, generator: torch.Generator
    ) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Return, for the activations named, their values and the mean square of the gradient of `signs . output` by each.

        The graph holds no Q/DQ pairs. What the output does not depend on is left out.
        """
        values: dict[ir.Value, Tensor] = {**self._constants}
        values[self._graph.inputs[0]] = torch.from_numpy(np.array(image)).requires_grad_()
        for node in self._graph:
            inputs = [None if value is None else values[value] for value in node.inputs]
            values.update(zip(node.outputs, _evaluate(node, inputs)))
        output = _joined([values[value] for value in self._graph.outputs])
        wanted = {v.name or "": tensor for v, tensor in values.items() if v.name in names and tensor.requires_grad}
        squares: dict[str, Tensor] = {}
        for probe in range(probes):
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
            product = (output * signs).sum()
            found = torch.autograd.grad(
                product, list(wanted.values()), retain_graph=probe < probes - 1, allow_unused=True
            )
            for name, gradient in zip(wanted, found):
                if gradient is not None:
                    squares[name] = squares.get(name, 0.0) + gradient.square() / probes
        return {name: (wanted[name].detach().numpy(), square.numpy()) for name, square in squares.items()}

    def _dequantize(
        self, node: ir.Node, values: dict[ir.Value, Tensor], lost: dict[ir.Value, Tensor], found: Run
    ) -> None:
        source, output = _input(node, 0), node.outputs[0]
        scale = values[_input(node, 1)].float()
        zero = values[_input(node, 2)].float() if len(node.inputs) > 2 else torch.zeros(())
        if source in self._constants:
            axis = int(_attribute(node, "axis", 1))
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


def _joined(outputs: list[Tensor]) -> Tensor:
    """Return the one output, or all that are numbers in one row, each brought to the same size."""
    if len(outputs) == 1:
        return outputs[0]
    rows = [value.reshape(-1) for value in outputs if value.dtype.is_floating_point]
    return torch.cat([row / row.detach().norm().clamp(min=1e-30) for row in rows])


_PAIR = ("QuantizeLinear", "DequantizeLinear")
CHANNEL_AXIS = {"Conv": 1, "MatMul": -1, "Gemm": -1}
"""The layers whose bias is corrected, and the channel axis of what they read and write."""


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # an input that its operator cannot be without
    return value


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _evaluate(node: ir.Node, x: list[Any]) -> list[Tensor]:
    while x and x[-1] is None:
        x.pop()
    if node.op_type == "Shape":
        return [torch.tensor(x[0].shape, dtype=torch.int64)]
    if node.op_type == "Split":
        axis, parts = int(_attribute(node, "axis", 0)), len(node.outputs)
        sizes = x[1].tolist() if len(x) > 1 else math.ceil(x[0].shape[axis] / parts)
        return list(torch.split(x[0], sizes, dim=axis))
    return [OPERATORS[node.op_type](node, *x)]


def _window(node: ir.Node, x: Tensor, *, fill: float = 0.0) -> tuple[Tensor, list[int], list[int]]:
    """Return the padded input, the strides and the dilations of a sliding window."""
    rank = x.dim() - 2
    if _attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported(f"layer {node.name!r} pads by auto_pad; export it with explicit pads", stage="quantize")
    pads = list(_attribute(node, "pads", [0] * 2 * rank))
    flat = [side for d in reversed(range(rank)) for side in (pads[d], pads[rank + d])]
    padded = functional.pad(x, flat, value=fill) if any(flat) else x
    return padded, list(_attribute(node, "strides", [1] * rank)), list(_attribute(node, "dilations", [1] * rank))


def _conv(node: ir.Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x, strides, dilations = _window(node, x)
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[w.dim() - 3]
    return convolution(x, w, b, strides, 0, dilations, int(_attribute(node, "group", 1)))


def _conv_transpose(node: ir.Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.dim() - 2
    _, strides, dilations = _window(node, x[..., :0])
    more, pads = list(_attribute(node, "output_padding", [0] * rank)), list(_attribute(node, "pads", [0] * 2 * rank))
    convolution = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    y = convolution(x, w, b, strides, 0, 0, int(_attribute(node, "group", 1)), dilations)
    y = functional.pad(y, [side for extra in reversed(more) for side in (0, extra)])
    for d in range(rank):
        y = y.narrow(2 + d, pads[d], y.shape[2 + d] - pads[d] - pads[rank + d])
    return y


def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if _attribute(node, "transA", 0) else a
    b = b.T if _attribute(node, "transB", 0) else b
    y = float(_attribute(node, "alpha", 1.0)) * (a @ b)
    return y if c is None else y + float(_attribute(node, "beta", 1.0)) * c


def _average_pool(node: ir.Node, x: Tensor) -> Tensor:
    kernel = list(_attribute(node, "kernel_shape", []))
    if len(kernel) != 2 or _attribute(node, "ceil_mode", 0):
        raise Unsupported(
            f"layer {node.name!r} is an average pooling with ceil_mode or not over two axes", stage="quantize"
        )
    padded, strides, _ = _window(node, x)
    total = functional.avg_pool2d(padded, kernel, strides)
    if _attribute(node, "count_include_pad", 0) or padded is x:
        return total
    inside, _, _ = _window(node, torch.ones_like(x[:, :1]))
    return total / functional.avg_pool2d(inside, kernel, strides)


def _max_pool(node: ir.Node, x: Tensor) -> Tensor:
    x, strides, dilations = _window(node, x, fill=float("-inf"))
    kernel = list(_attribute(node, "kernel_shape", []))
    return functional.max_pool2d(x, kernel, strides, 0, dilations, bool(_attribute(node, "ceil_mode", 0)))


def _layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = int(_attribute(node, "axis", -1))
    y = functional.layer_norm(x, x.shape[axis:], None, None, float(_attribute(node, "epsilon", 1e-5))) * scale
    return y if bias is None else y + bias


def _along_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape([1, -1, *[1] * (x.dim() - 2)])


def _batch_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, bias, eps=float(_attribute(node, "epsilon", 1e-5)))


def _group_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = int(_attribute(node, "num_groups", x.shape[1]))  # InstanceNormalization has one channel in each
    y = functional.group_norm(x, groups, eps=float(_attribute(node, "epsilon", 1e-5)))
    per_channel = [v.repeat_interleave(x.shape[1] // v.numel()) for v in (scale, bias)]
    return y * _along_channels(per_channel[0], x) + _along_channels(per_channel[1], x)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = _attribute(node, "axes", None) if axes is None else axes.tolist()
        if given is None and _attribute(node, "noop_with_empty_axes", 0):
            return x
        return function(x, tuple(given if given is not None else range(x.dim())), bool(_attribute(node, "keepdims", 1)))

    return reduce


def _reshape(node: ir.Node, x: Tensor, shape: Tensor) -> Tensor:
    kept = _attribute(node, "allowzero", 0)
    return x.reshape([x.shape[i] if side == 0 and not kept else side for i, side in enumerate(shape.tolist())])


def _axes(node: ir.Node, axes: Tensor | None) -> list[int]:
    return list(_attribute(node, "axes", [])) if axes is None else [int(a) for a in axes.tolist()]


def _squeeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze(tuple(_axes(node, axes))) if axes is not None else x.squeeze()


def _unsqueeze(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(node, axes)
    for axis in sorted(a % (x.dim() + len(wanted)) for a in wanted):
        x = x.unsqueeze(axis)
    return x


def _slice(node: ir.Node, x: Tensor, starts: Tensor, ends: Tensor, axes: Any = None, steps: Any = None) -> Tensor:
    along = axes.tolist() if axes is not None else range(len(starts))
    for axis, start, end, step in zip(
        along, starts.tolist(), ends.tolist(), steps.tolist() if steps is not None else [1] * 9
    ):
        picked = list(range(*slice(start, end if end > -(1 << 62) else None, step).indices(x.shape[axis])))
        x = x.index_select(axis, torch.tensor(picked, dtype=torch.int64))
    return x


def _gather(node: ir.Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = int(_attribute(node, "axis", 0)) % x.dim()
    flat = indices.reshape(-1).long() % x.shape[axis]
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _pad(node: ir.Node, x: Tensor, pads: Tensor, value: Any = None, axes: Any = None) -> Tensor:
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[_attribute(node, "mode", "constant")]
    sides, count = [0] * 2 * x.dim(), len(pads) // 2
    for i, axis in enumerate(axes.tolist() if axes is not None else range(count)):
        last = x.dim() - 1 - axis % x.dim()
        sides[2 * last : 2 * last + 2] = [int(pads[i]), int(pads[count + i])]
    if mode == "constant":
        return functional.pad(x, sides, value=float(value) if value is not None else 0.0)
    return functional.pad(x, sides[:4], mode=mode)


def _resize(node: ir.Node, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    wanted = sizes.tolist()[2:] if sizes is not None else [int(s * n) for s, n in zip(scales.tolist()[2:], x.shape[2:])]
    mode = _attribute(node, "mode", "nearest")
    if mode == "nearest":
        return functional.interpolate(x, wanted, mode="nearest")
    aligned = _attribute(node, "coordinate_transformation_mode", "half_pixel") == "align_corners"
    smooth = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    return functional.interpolate(
        x, wanted, mode=smooth, align_corners=aligned, antialias=bool(_attribute(node, "antialias", 0))
    )


def _depth_to_space(node: ir.Node, x: Tensor) -> Tensor:
    size = int(_attribute(node, "blocksize", 1))
    if _attribute(node, "mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    parts = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // size**2, h * size, w * size)


def _cast(node: ir.Node, x: Tensor) -> Tensor:
    return x.to(
        {1: torch.float32, 7: torch.int64, 6: torch.int32, 9: torch.bool, 10: torch.float32}[
            int(_attribute(node, "to", 1))
        ]
    )


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator without attributes."""
    return lambda node, *x: function(*x)


def _clip(node: ir.Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return torch.clamp(x, low, high) if low is not None or high is not None else x


def _pairs() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    for name, function in (
        ("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div), ("Pow", torch.pow), ("Neg", torch.neg),
        ("MatMul", torch.matmul), ("Sqrt", torch.sqrt), ("Abs", torch.abs), ("Exp", torch.exp), ("Log", torch.log),
        ("Erf", torch.erf),
        ("Tanh", torch.tanh), ("Sigmoid", torch.sigmoid), ("Relu", torch.relu), ("HardSwish", functional.hardswish),
        ("Softplus", functional.softplus), ("Mish", functional.mish), ("Reciprocal", torch.reciprocal), ("Sin", torch.sin),
        ("Cos", torch.cos), ("Min", torch.minimum), ("Max", torch.maximum), ("Where", torch.where), ("Identity", lambda x: x),
        ("Equal", torch.eq), ("Less", torch.lt), ("Greater", torch.gt), ("Not", torch.logical_not), ("Floor", torch.floor),
    ):  # fmt: skip
        yield name, _plain(function)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    **dict(_pairs()),
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "AveragePool": _average_pool, "MaxPool": _max_pool,
    "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm, "GroupNormalization": _group_norm,
    "InstanceNormalization": _group_norm, "Reshape": _reshape, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Slice": _slice,
    "Gather": _gather, "Pad": _pad, "Resize": _resize, "DepthToSpace": _depth_to_space, "Cast": _cast, "Clip": _clip,
    "GlobalAveragePool": lambda node, x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True),
    "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum), "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin), "ReduceL2": _reduced(lambda x, d, keep: x.norm(dim=d, keepdim=keep)),
    "Softmax": lambda node, x: torch.softmax(x, int(_attribute(node, "axis", -1))),
    "LogSoftmax": lambda node, x: torch.log_softmax(x, int(_attribute(node, "axis", -1))),
    "Transpose": lambda node, x: x.permute(*_attribute(node, "perm", range(x.dim())[::-1])),
    "Flatten": lambda node, x: x.reshape(math.prod(x.shape[: int(_attribute(node, "axis", 1))]), -1),
    "Concat": lambda node, *x: torch.cat(x, int(_attribute(node, "axis", 0))),
    "Expand": lambda node, x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist()))),
    "Tile": lambda node, x, repeats: x.repeat(*repeats.tolist()),
    "LeakyRelu": lambda node, x: functional.leaky_relu(x, float(_attribute(node, "alpha", 0.01))),
    "PRelu": lambda node, x, slope: torch.where(x < 0, x * slope, x),
    "Elu": lambda node, x: functional.elu(x, float(_attribute(node, "alpha", 1.0))),
    "HardSigmoid": lambda node, x: torch.clamp(
        x * float(_attribute(node, "alpha", 0.2)) + float(_attribute(node, "beta", 0.5)), 0.0, 1.0
    ),
    "Gelu": lambda node, x: functional.gelu(x, approximate=_attribute(node, "approximate", "none")),
    "Einsum": lambda node, *x: torch.einsum(_attribute(node, "equation", ""), *x),
}  # fmt: skip
"""What can be differentiated; each takes the node and its inputs."""
