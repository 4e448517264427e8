"""The operators of ONNX in PyTorch, so that gradients flow through them: a node and its inputs go in, its outputs come out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from rdeploy.errors import Unsupported
from rdeploy.quantize.operators import interpolation, shapes, windows
from rdeploy.quantize.operators.attributes import attribute


def evaluate(node: ir.Node, inputs: list[Any]) -> list[Tensor]:
    """Return the node's outputs.

    Raises:
        Unsupported: the operator, or this use of it, is not known here; the message names the layer.
    """
    while inputs and inputs[-1] is None:
        inputs.pop()
    try:
        found = _evaluate(node, inputs)
    except Exception as error:  # whatever torch raises where ONNX means something else is the reason
        reason = (str(error).splitlines() or [""])[0]
        why = f"KeyError {reason}" if isinstance(error, KeyError) else reason
        raise _without_gradient(node, why) from error
    if any(output.uses() or output.is_graph_output() for output in node.outputs[len(found) :]):
        raise _without_gradient(node, "what it writes beside its first output")
    return found


def _without_gradient(node: ir.Node, why: str) -> Unsupported:
    return Unsupported(f"layer {node.name!r} ({node.op_type}) has no gradient in rdeploy: {why}", stage="quantize")


def _evaluate(node: ir.Node, x: list[Any]) -> list[Tensor]:
    if node.op_type == "Shape":
        return [torch.tensor(x[0].shape[attribute(node, "start", 0) : attribute(node, "end", None)], dtype=torch.int64)]
    if node.op_type == "Split":
        axis, parts = int(attribute(node, "axis", 0)), len(node.outputs)
        sizes = x[1].tolist() if len(x) > 1 else math.ceil(x[0].shape[axis] / parts)
        return list(torch.split(x[0], sizes, dim=axis))
    return [OPERATORS[node.op_type](node, *x)]


def _gemm(node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if attribute(node, "transA", 0) else a
    b = b.T if attribute(node, "transB", 0) else b
    y = float(attribute(node, "alpha", 1.0)) * (a @ b)
    return y if c is None else y + float(attribute(node, "beta", 1.0)) * c


def _layer_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = int(attribute(node, "axis", -1))
    y = functional.layer_norm(x, x.shape[axis:], None, None, float(attribute(node, "epsilon", 1e-5))) * scale
    return y if bias is None else y + bias


def _batch_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, bias, eps=float(attribute(node, "epsilon", 1e-5)))


def _group_norm(node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = int(attribute(node, "num_groups", x.shape[1]))  # InstanceNormalization has one channel in each
    y = functional.group_norm(x, groups, eps=float(attribute(node, "epsilon", 1e-5)))
    along = [1, -1, *[1] * (x.dim() - 2)]
    scale, bias = (v.repeat_interleave(x.shape[1] // v.numel()).reshape(along) for v in (scale, bias))
    return y * scale + bias


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = attribute(node, "axes", None) if axes is None else axes.tolist()
        if not given and attribute(node, "noop_with_empty_axes", 0):
            return x
        return function(x, tuple(given or range(x.dim())), bool(attribute(node, "keepdims", 1)))

    return reduce


def _clip(node: ir.Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return torch.clamp(x, low, high) if low is not None or high is not None else x


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator without attributes."""
    return lambda node, *x: function(*x)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of one or more inputs."""
    return lambda node, *x: functools.reduce(function, x)


def _pairs() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    for name, function in (
        ("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div), ("Pow", torch.pow), ("Neg", torch.neg),
        ("MatMul", torch.matmul), ("Sqrt", torch.sqrt), ("Abs", torch.abs), ("Exp", torch.exp), ("Log", torch.log),
        ("Erf", torch.erf), ("Sign", torch.sign), ("Softsign", functional.softsign), ("Selu", functional.selu),
        ("Tanh", torch.tanh), ("Sigmoid", torch.sigmoid), ("Relu", torch.relu), ("HardSwish", functional.hardswish),
        ("Softplus", functional.softplus), ("Mish", functional.mish), ("Reciprocal", torch.reciprocal), ("Sin", torch.sin),
        ("Cos", torch.cos), ("Where", torch.where), ("Identity", lambda x: x), ("And", torch.logical_and),
        ("Or", torch.logical_or),
        ("Equal", torch.eq), ("Less", torch.lt), ("Greater", torch.gt), ("Not", torch.logical_not), ("Floor", torch.floor),
        ("LessOrEqual", torch.le), ("GreaterOrEqual", torch.ge), ("Ceil", torch.ceil), ("CastLike", lambda x, y: x.to(y.dtype)),
    ):  # fmt: skip
        yield name, _plain(function)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    **dict(_pairs()),
    "Conv": windows.conv, "ConvTranspose": windows.conv_transpose, "AveragePool": windows.average_pool,
    "MaxPool": windows.max_pool, "Gemm": _gemm, "Resize": interpolation.resize, "Clip": _clip,
    "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm, "GroupNormalization": _group_norm,
    "InstanceNormalization": _group_norm, "Reshape": shapes.reshape, "Squeeze": shapes.squeeze, "Unsqueeze": shapes.unsqueeze,
    "Slice": shapes.cut, "Gather": shapes.gather, "Pad": shapes.pad, "DepthToSpace": shapes.depth_to_space,
    "SpaceToDepth": shapes.space_to_depth, "Cast": shapes.cast, "ConstantOfShape": shapes.constant_of_shape,
    "Range": lambda node, start, limit, delta: torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype),
    "Min": _folded(torch.minimum), "Max": _folded(torch.maximum), "Sum": _folded(torch.add),
    "Mean": lambda node, *x: functools.reduce(torch.add, x) / len(x),
    "GlobalAveragePool": lambda node, x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(dim=tuple(range(2, x.dim())), keepdim=True),
    "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum), "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin), "ReduceL2": _reduced(lambda x, d, keep: torch.linalg.vector_norm(x, dim=d, keepdim=keep)),
    "ReduceL1": _reduced(lambda x, d, keep: x.abs().sum(dim=d, keepdim=keep)),
    "ReduceSumSquare": _reduced(lambda x, d, keep: x.square().sum(dim=d, keepdim=keep)),
    "Softmax": lambda node, x: torch.softmax(x, int(attribute(node, "axis", -1))),
    "LogSoftmax": lambda node, x: torch.log_softmax(x, int(attribute(node, "axis", -1))),
    "Transpose": lambda node, x: x.permute(*attribute(node, "perm", range(x.dim())[::-1])),
    "Flatten": lambda node, x: x.reshape(math.prod(x.shape[: int(attribute(node, "axis", 1))]), -1),
    "Concat": lambda node, *x: torch.cat(x, int(attribute(node, "axis", 0))),
    "Expand": lambda node, x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist()))),
    "Tile": lambda node, x, repeats: x.repeat(*repeats.tolist()),
    "LeakyRelu": lambda node, x: functional.leaky_relu(x, float(attribute(node, "alpha", 0.01))),
    "PRelu": lambda node, x, slope: torch.where(x < 0, x * slope, x),
    "Elu": lambda node, x: functional.elu(x, float(attribute(node, "alpha", 1.0))),
    "HardSigmoid": lambda node, x: torch.clamp(
        x * float(attribute(node, "alpha", 0.2)) + float(attribute(node, "beta", 0.5)), 0.0, 1.0
    ),
    "Gelu": lambda node, x: functional.gelu(x, approximate=attribute(node, "approximate", "none")),
    "Einsum": lambda node, *x: torch.einsum(attribute(node, "equation", ""), *x),
}  # fmt: skip
"""What can be differentiated; each takes the node and its inputs. Shape and Split are evaluated besides."""
