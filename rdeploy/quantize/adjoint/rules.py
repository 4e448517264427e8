"""How a gradient passes an operator that computes element by element, reduces, normalises or multiplies matrices.

A rule takes the tape, the node, which of its inputs is asked for, and the gradient of its output; it returns that of the input,
or None where a change of the input changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from rdeploy.errors import Unsupported
from rdeploy.quantize.adjoint.tape import Shape, Tape, number
from rdeploy.quantize.operators.attributes import attribute

Rule = Callable[[Tape, ir.Node, int, ir.Value], "ir.Value | None"]
_ZERO = np.zeros(1, np.float32)


def _f(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def summed(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Return the gradient for an input that may have been broadcast."""
    return t.summed(g, t.shape(node.outputs[0]), t.shape(node.inputs[i]))


def add(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Add, Sum, and Mean."""
    return summed(t, node, i, t.scaled(g, 1 / len(node.inputs) if node.op_type == "Mean" else 1.0))


def sub(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Sub."""
    return summed(t, node, i, t.op("Neg", g) if i else g)


def mul(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Mul."""
    return summed(t, node, i, t.op("Mul", g, node.inputs[1 - i]))


def div(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Div."""
    part = t.op("Div", g, node.inputs[1])
    return summed(t, node, i, t.op("Neg", t.op("Mul", part, node.outputs[0])) if i else part)


def power(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Pow, by a constant exponent."""
    exponent = number(node.inputs[1]).astype(np.float32)
    if i or exponent.size != 1:
        raise Unsupported("an exponent that is computed", stage="quantize")
    p = float(exponent.reshape(-1)[0])
    slope = node.inputs[0] if p == 2 else t.op("Pow", node.inputs[0], _f(p - 1))
    return t.op("Mul", g, t.scaled(slope, p)) if slope is not None else g


def extreme(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Min and Max: the one that is taken feels it."""
    taken = t.op("Equal", node.inputs[i], node.outputs[0])
    return summed(t, node, i, t.op("Where", taken, g, _ZERO))


def where(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Where."""
    if i == 0:
        return None
    return summed(t, node, i, t.op("Where", node.inputs[0], *((g, _ZERO) if i == 1 else (_ZERO, g))))


def clip(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value | None:
    """Clip: what lies within passes. Asked of the output, so that the input need not be kept."""
    if i:
        return None
    for index, kind in ((1, "Greater"), (2, "Less")):
        if len(node.inputs) > index and node.inputs[index] is not None:
            g = t.op("Where", t.op(kind, node.outputs[0], node.inputs[index]), g, _ZERO)
    return g


def relu(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Relu."""
    return t.op("Where", t.op("Greater", node.outputs[0], _ZERO), g, _ZERO)


def leaky(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """LeakyRelu and PRelu."""
    if i:
        raise Unsupported("a slope that is computed", stage="quantize")
    slope = node.inputs[1] if node.op_type == "PRelu" else _f(attribute(node, "alpha", 0.01))
    return t.op("Where", t.op("Less", node.inputs[0], _ZERO), t.op("Mul", g, slope), g)


def elu(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Elu: below zero its slope is y + alpha."""
    slope = t.op("Add", node.outputs[0], _f(attribute(node, "alpha", 1.0)))
    return t.op("Where", t.op("Less", node.inputs[0], _ZERO), t.op("Mul", g, slope), g)


def sigmoid(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Sigmoid: y (1 - y)."""
    y = node.outputs[0]
    return t.op("Mul", g, t.op("Mul", y, t.op("Sub", _f(1.0), y)))


def tanh(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Tanh: 1 - y^2."""
    y = node.outputs[0]
    return t.op("Mul", g, t.op("Sub", _f(1.0), t.op("Mul", y, y)))


def hard_sigmoid(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """HardSigmoid: alpha where the output lies within 0 and 1."""
    y = node.outputs[0]
    inside = t.op("And", t.op("Greater", y, _ZERO), t.op("Less", y, _f(1.0)))
    return t.op("Where", inside, t.scaled(g, attribute(node, "alpha", 0.2)), _ZERO)


def hard_swish(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """HardSwish: 0 below -3, x / 3 + 1 / 2 within, 1 above 3."""
    x = node.inputs[0]
    within = t.op("Add", t.op("Mul", x, _f(1 / 3)), _f(0.5))
    slope = t.op("Where", t.op("Less", x, _f(3.0)), within, _f(1.0))
    return t.op("Where", t.op("Greater", x, _f(-3.0)), t.op("Mul", g, slope), _ZERO)


def erf(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Erf: 2 / sqrt(pi) exp(-x^2)."""
    x = node.inputs[0]
    return t.op("Mul", g, t.scaled(t.op("Exp", t.op("Neg", t.op("Mul", x, x))), 2 / math.sqrt(math.pi)))


def gelu(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Gelu, exact or by tanh: y = x P(x) has the slope P + x P'."""
    x = node.inputs[0]
    square = t.op("Mul", x, x)
    if attribute(node, "approximate", "none") == "tanh":
        inner = t.scaled(
            t.op("Mul", x, t.op("Add", t.op("Mul", square, _f(0.044715)), _f(1.0))), math.sqrt(2 / math.pi)
        )
        bent = t.op("Tanh", inner)
        steep = t.scaled(t.op("Add", t.op("Mul", square, _f(3 * 0.044715)), _f(1.0)), 0.5 * math.sqrt(2 / math.pi))
        density = t.op("Mul", steep, t.op("Sub", _f(1.0), t.op("Mul", bent, bent)))
    else:
        bent = t.op("Erf", t.op("Mul", x, _f(math.sqrt(0.5))))
        density = t.scaled(t.op("Exp", t.op("Mul", square, _f(-0.5))), 1 / math.sqrt(2 * math.pi))
    share = t.op("Mul", t.op("Add", bent, _f(1.0)), _f(0.5))
    return t.op("Mul", g, t.op("Add", share, t.op("Mul", x, density)))


def _of_x(kind: str) -> Rule:
    """A slope that is a function of x: `kind` is the operator that gives it."""
    return lambda t, node, i, g: t.op("Mul", g, t.op(kind, node.inputs[0]))


def softplus(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Softplus: the sigmoid."""
    return t.op("Mul", g, t.op("Sigmoid", node.inputs[0]))


def square_root(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Sqrt: 1 / (2 y)."""
    return t.op("Div", t.scaled(g, 0.5), node.outputs[0])


def reciprocal(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Reciprocal: -y^2."""
    y = node.outputs[0]
    return t.op("Neg", t.op("Mul", g, t.op("Mul", y, y)))


def softmax(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Softmax: y (g - sum g y); LogSoftmax: g - exp(y) sum g."""
    y, axis = node.outputs[0], np.array([attribute(node, "axis", -1)], np.int64)
    if node.op_type == "LogSoftmax":
        return t.op("Sub", g, t.op("Mul", t.op("Exp", y), t.op("ReduceSum", g, axis, keepdims=1)))
    return t.op("Mul", y, t.op("Sub", g, t.op("ReduceSum", t.op("Mul", g, y), axis, keepdims=1)))


def _normalised(t: Tape, x: ir.Value, g: ir.Value, shape: Shape, axes: list[int], epsilon: float) -> ir.Value:
    """Return the gradient by x, of `shape`, of (x - mean) / sqrt(variance + epsilon) over some axes."""
    count = math.prod(shape[axis] for axis in axes)

    def mean(value: ir.Value) -> ir.Value:  # of sums: ReduceMean takes its axes in another way before opset 18
        return t.scaled(t.op("ReduceSum", value, np.array(axes, np.int64), keepdims=1), 1 / count)

    centred = t.op("Sub", x, mean(x))
    variance = mean(t.op("Mul", centred, centred))
    inverse = t.op("Reciprocal", t.op("Sqrt", t.op("Add", variance, _f(epsilon))))
    y = t.op("Mul", centred, inverse)
    return t.op("Mul", t.op("Sub", t.op("Sub", g, mean(g)), t.op("Mul", y, mean(t.op("Mul", g, y)))), inverse)


def layer_norm(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """LayerNormalization, of what is normalised."""
    x = node.inputs[0]
    if i or x is None:
        raise Unsupported("a scale that is computed", stage="quantize")
    shape = t.shape(x)
    axes = list(range(int(attribute(node, "axis", -1)) % len(shape), len(shape)))
    return _normalised(t, x, t.op("Mul", g, node.inputs[1]), shape, axes, float(attribute(node, "epsilon", 1e-5)))


def group_norm(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """GroupNormalization and InstanceNormalization, of what is normalised."""
    if i:
        raise Unsupported("a scale that is computed", stage="quantize")
    shape = t.shape(node.inputs[0])
    groups = int(attribute(node, "num_groups", shape[1]))
    scale = number(node.inputs[1]).astype(np.float32)
    each = np.repeat(scale, shape[1] // scale.size).reshape(-1, *[1] * (len(shape) - 2))
    parts = (shape[0], groups, math.prod(shape[1:]) // groups)
    x, g = (t.reshaped(v, parts) for v in (node.inputs[0], t.op("Mul", g, each)) if v is not None)
    return t.reshaped(_normalised(t, x, g, parts, [2], float(attribute(node, "epsilon", 1e-5))), shape)


def batch_norm(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """BatchNormalization at inference: a factor a channel."""
    if i:
        raise Unsupported("a scale that is computed", stage="quantize")
    scale, variance = number(node.inputs[1]), number(node.inputs[4])
    factor = (scale / np.sqrt(variance + float(attribute(node, "epsilon", 1e-5)))).astype(np.float32)
    return t.op("Mul", g, factor.reshape(-1, *[1] * (len(t.shape(node.inputs[0])) - 2)))


def _reduced(t: Tape, node: ir.Node) -> tuple[Shape, Shape, list[int]]:
    """Return the shapes before and after a reduction, the axes kept, and the axes."""
    shape = t.shape(node.inputs[0])
    given = attribute(node, "axes", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = number(node.inputs[1]).tolist()
    if node.op_type.startswith("Global"):
        given = range(2, len(shape))
    elif not given and attribute(node, "noop_with_empty_axes", 0):
        given = []
    elif not given:
        given = range(len(shape))
    axes = [int(axis) % len(shape) for axis in given]
    return shape, tuple(1 if i in axes else side for i, side in enumerate(shape)), axes


def mean(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """ReduceMean, ReduceSum and GlobalAveragePool."""
    shape, kept, axes = _reduced(t, node)
    count = 1 if node.op_type == "ReduceSum" else math.prod(shape[axis] for axis in axes)
    return t.op("Expand", t.scaled(t.reshaped(g, kept), 1 / count), np.array(shape, np.int64))


def norm(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """ReduceL2 and ReduceSumSquare."""
    _, kept, _ = _reduced(t, node)
    g = t.reshaped(g, kept)
    if node.op_type == "ReduceSumSquare":
        return t.op("Mul", node.inputs[0], t.scaled(g, 2.0))
    return t.op("Mul", node.inputs[0], t.op("Div", g, t.reshaped(node.outputs[0], kept)))


def largest(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """ReduceMax, ReduceMin and GlobalMaxPool: those that are as large share it."""
    _, kept, axes = _reduced(t, node)
    taken = t.op("Cast", t.op("Equal", node.inputs[0], t.reshaped(node.outputs[0], kept)), to=int(ir.DataType.FLOAT))
    count = t.op("ReduceSum", taken, np.array(axes, np.int64), keepdims=1)
    return t.op("Mul", taken, t.op("Div", t.reshaped(g, kept), count))


def matmul(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """MatMul: g b' and a' g, added up over the axes that were broadcast."""
    a, b = (t.shape(value) for value in node.inputs)
    if min(len(a), len(b)) < 2:
        raise Unsupported("a product with a vector", stage="quantize")
    other = node.inputs[1 - i]
    if i and len(b) == 2 and len(a) > 2:  # weights: one product over all rows, not one for each matrix
        rows = math.prod(a[:-1])
        columns = t.op("Transpose", t.reshaped(other, (rows, a[-1])), perm=[1, 0])
        return t.op("MatMul", columns, t.reshaped(g, (rows, b[-1])))
    rank = len((b, a)[i])
    turned = t.op("Transpose", other, perm=[*range(rank - 2), rank - 1, rank - 2])
    found = t.op("MatMul", turned, g) if i else t.op("MatMul", g, turned)
    outer = t.shape(node.outputs[0])[:-2]
    return t.summed(found, (*outer, *(b if i else a)[-2:]), b if i else a)


def gemm(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Gemm."""
    if i == 2:
        return summed(t, node, i, t.scaled(g, float(attribute(node, "beta", 1.0))))
    a, b = node.inputs[0], node.inputs[1]
    by_row, by_column = (int(attribute(node, name, 0)) for name in ("transA", "transB"))
    alpha = float(attribute(node, "alpha", 1.0))
    if i == 0:
        inputs, turned = ((b, g), (by_column, 1)) if by_row else ((g, b), (0, 1 - by_column))
    else:
        inputs, turned = ((g, a), (1, by_row)) if by_column else ((a, g), (1 - by_row, 0))
    return t.op("Gemm", *inputs, alpha=alpha, transA=turned[0], transB=turned[1])


def einsum(t: Tape, node: ir.Node, i: int, g: ir.Value) -> ir.Value:
    """Einsum of one or two factors, each index written once: output and input change places."""
    equation = attribute(node, "equation", "").replace(" ", "")
    if "->" not in equation or "." in equation or len(node.inputs) > 2:
        raise Unsupported(f"Einsum {equation!r}", stage="quantize")
    left, out = equation.split("->")
    terms = left.split(",")
    others = [(term, value) for j, (term, value) in enumerate(zip(terms, node.inputs)) if j != i]
    known = set(out).union(*(term for term, _ in others))
    if set(terms[i]) - known or any(len(set(term)) < len(term) for term in (*terms, out)):
        raise Unsupported(f"Einsum {equation!r}", stage="quantize")
    turned = ",".join([out, *(term for term, _ in others)])
    return t.op("Einsum", g, *(value for _, value in others), equation=f"{turned}->{terms[i]}")


def _nothing(t: Tape, node: ir.Node, i: int, g: ir.Value) -> None:
    """What is a step or a comparison: a small change changes nothing."""


RULES: dict[str, Rule] = {
    "Add": add, "Sum": add, "Mean": add, "Sub": sub, "Mul": mul, "Div": div, "Pow": power, "Min": extreme, "Max": extreme,
    "Where": where, "Clip": clip, "Relu": relu, "LeakyRelu": leaky, "PRelu": leaky, "Elu": elu, "Sigmoid": sigmoid,
    "Tanh": tanh, "HardSigmoid": hard_sigmoid, "HardSwish": hard_swish, "Erf": erf, "Gelu": gelu, "Softplus": softplus,
    "Sqrt": square_root, "Reciprocal": reciprocal, "Abs": _of_x("Sign"), "Log": _of_x("Reciprocal"), "Exp": _of_x("Exp"),
    "Neg": lambda t, node, i, g: t.op("Neg", g), "Softmax": softmax, "LogSoftmax": softmax,
    "LayerNormalization": layer_norm, "GroupNormalization": group_norm, "InstanceNormalization": group_norm,
    "BatchNormalization": batch_norm, "ReduceMean": mean, "ReduceSum": mean, "GlobalAveragePool": mean, "ReduceL2": norm,
    "ReduceSumSquare": norm, "ReduceMax": largest, "ReduceMin": largest, "GlobalMaxPool": largest, "MatMul": matmul,
    "Gemm": gemm, "Einsum": einsum, "Expand": summed,
    **dict.fromkeys(("Floor", "Ceil", "Round", "Sign", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Shape",
                     "ArgMax", "IsNaN", "IsInf"), _nothing),
}  # fmt: skip
