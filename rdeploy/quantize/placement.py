"""Decide where Q/DQ pairs go: an ONNX graph and a runtime's QuantScheme go in, the places and the reasons come out.

The rules, in the order in which they are asked:

- A convolution, Gemm or MatMul with constant weights gets its weights and its activation input quantized.
- A MatMul of two activations (attention), softmax, normalisation, GELU stay in float.
- Where the graph holds attention, the patch embedding stays in float: it is one layer in dozens, and sees the raw image.
- With `scheme.patches` it does not; with `scheme.products` both factors of products of two activations are quantized as well:
  of "all", or of the "scores", those that read nothing that a softmax puts out.
- Runtimes whose integer kernel writes integers (`scheme.output_ops`) get the output quantized as well: after the ReLU or
  Clip that the kernel absorbs, before anything else.
- A residual Add follows `scheme.residual`. Reshaping and nearest resizing carry quantized values through: both runtimes and
  TensorRT move a Q/DQ pair across them by themselves, so no pair is placed there.
- A max pooling whose output is read quantized reads its input quantized: OpenVINO moves no pair across it, and would write
  what comes before in float (ResNet-50: the whole stem, 3 to 4 % of the latency).
- What scales a map down behind a convolution (`--at stem`) stays in integers as well: the padding that repeats the border
  reads integers, and so does an average pooling of what a convolution wrote. The bilinear resize after a low-pass is in float.
- The inputs of a Concat share one range, and so do the two ends of a max pooling or a reshape: they stay copies of integers.
  A Concat of token sequences (N, tokens, C) reads float, and so does what reads it where the runtime says so.
- Biases stay in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from rdeploy.types import QuantScheme

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUSED = ("Relu", "Clip")
"""Activations that an integer kernel absorbs into its output's rounding."""
CARRIERS = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")
"""Operators that only move values: their output has their input's range."""


@dataclass(slots=True)
class Placement:
    """Where Q/DQ pairs go.

    `reads` maps an activation's name to the (node, input index) pairs that read it quantized; `weights` maps a weighted
    node to its channel axis; `shared` are groups of activations that need one common range.
    """

    reads: dict[str, list[tuple[ir.Node, int]]] = field(default_factory=dict)
    weights: dict[ir.Node, int] = field(default_factory=dict)
    shared: list[set[str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def read(self, node: ir.Node, index: int) -> None:
        """Let `node` read its input `index` through a Q/DQ pair."""
        value = node.inputs[index]
        if value is not None and value.name and (node, index) not in self.reads.setdefault(value.name, []):
            self.reads[value.name].append((node, index))

    def factors(self) -> tuple[str, ...]:
        """Return the activations that a product of two activations reads quantized: queries, keys, probabilities, values."""
        return tuple(name for name, readers in self.reads.items() if any(multiplies_activations(n) for n, _ in readers))


def place(model: ir.Model, scheme: QuantScheme, *, keep_float: Iterable[str] = ()) -> Placement:
    """Return where Q/DQ pairs go in `model` for a runtime with `scheme`; nodes named in `keep_float` stay in float."""
    placement, excluded = Placement(), frozenset(keep_float)
    attention = has_attention(model.graph)
    axes: dict[str, int] = {}
    for node in model.graph:
        if node.op_type not in WEIGHTED or node.op_type not in scheme.ops:
            continue
        if attention and node.name not in excluded and _in_integers(node, scheme):
            placement.read(node, 0)
            placement.read(node, 1)
            continue
        axis = channel_axis(node)
        reason = _stays_float(node, scheme, attention=attention, excluded=excluded)
        if reason is None and axes.setdefault(_name(weight_of(node)), axis) != axis:
            reason = "shares its weights with a layer that lays them out otherwise"
        if reason is not None:
            placement.skipped.append((node.name or node.op_type, reason))
            continue
        placement.weights[node] = axis
        placement.read(node, 0)
        if node.op_type in scheme.output_ops:
            _quantize_output(placement, node)
    for node in model.graph:
        if node.name in excluded:
            continue
        if node.op_type == "Add" and node.op_type in scheme.ops:
            _place_residual(placement, node, scheme.residual)
        elif node.op_type == "Concat" and node.op_type in scheme.ops:
            _place_concat(placement, node)
        elif node.op_type in ("GlobalAveragePool", "AveragePool") and node.op_type in scheme.ops:
            _place_pooling(placement, node)
    _read_through(placement, model.graph, scheme)
    _share_through_carriers(placement, model.graph)
    placement.shared = _merged(placement.shared)
    return placement


def _read_through(placement: Placement, graph: ir.Graph, scheme: QuantScheme) -> None:
    """Let what only moves or averages values in front of integer kernels read integers.

    With one range at both ends of a max pooling or of a padding that repeats the border, the values stay the same.
    """
    for node in reversed(graph):  # a chain of poolings, from its end
        if (node.op_type == "MaxPool" and "MaxPool" in scheme.ops) or _repeats(node):
            if placement.reads.get(_name(node.outputs[0])):
                placement.read(node, 0)
        elif node.op_type == "AveragePool" and "AveragePool" in scheme.ops:
            written_by = node.inputs[0].producer() if node.inputs[0] is not None else None
            if written_by in placement.weights and placement.reads.get(_name(after_fused(node))):
                placement.read(node, 0)


def _repeats(node: ir.Node) -> bool:
    """Whether this is a padding that puts in no value of its own."""
    mode = node.attributes.get("mode")
    return node.op_type == "Pad" and mode is not None and mode.as_string() in ("edge", "reflect", "wrap")


def _share_through_carriers(placement: Placement, graph: ir.Graph) -> None:
    """Give what a carrier reads and what it writes one range where both are quantized: it then moves integers."""
    for node in graph:
        if (node.op_type in CARRIERS or _repeats(node)) and node.inputs and node.inputs[0] is not None:
            names = {_name(node.inputs[0]), _name(node.outputs[0])}
            if all(placement.reads.get(name) for name in names):
                placement.shared.append(names)


def _merged(groups: list[set[str]]) -> list[set[str]]:
    """Join the groups that have a tensor in common."""
    merged: list[set[str]] = []
    for group in groups:
        joined = set(group)
        for other in [m for m in merged if m & joined]:
            joined |= other
            merged.remove(other)
        merged.append(joined)
    return merged


def _stays_float(node: ir.Node, scheme: QuantScheme, *, attention: bool, excluded: frozenset[str]) -> str | None:
    if node.name in excluded:
        return "kept in float on request"
    if weight_of(node) is None:
        return "multiplies two activations (attention)"
    if is_constant(node.inputs[0]):
        return "its input is constant"
    if attention and not scheme.patches and is_patch_embedding(node):
        return "patch embedding"
    if not scheme.joined_tokens and _joins_tokens(node.inputs[0]):
        return "reads joined token sequences, which this runtime cannot load in integers"
    if node.op_type == "Gemm" and (_number(node, "alpha", 1.0) != 1.0 or _number(node, "beta", 1.0) != 1.0):
        return "Gemm with alpha or beta"
    return None


def _in_integers(node: ir.Node, scheme: QuantScheme) -> bool:
    """Whether this is a product of two activations that the scheme quantizes."""
    if scheme.products == "none" or not multiplies_activations(node):
        return False
    return scheme.products == "all" or not any(_is_probability(value) for value in node.inputs)


def _is_probability(value: ir.Value | None) -> bool:
    """Whether a value comes out of a softmax, moved or cast since."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in (*CARRIERS, "Cast", "Dropout"):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == "Softmax"


def multiplies_activations(node: ir.Node) -> bool:
    """Whether this is a product of two activations, as attention has two of."""
    return node.op_type == "MatMul" and not any(is_constant(value) for value in node.inputs)


def _quantize_output(placement: Placement, node: ir.Node) -> None:
    """Quantize what leaves the kernel: every reader of it reads integers, or the kernel would not be an integer one."""
    value = after_fused(node)
    if value.is_graph_output():
        return
    for user, index in list(value.uses()):
        placement.read(user, index)


def _place_residual(placement: Placement, node: ir.Node, rule: str) -> None:
    branches = [i for i, v in enumerate(node.inputs) if v is not None and not is_constant(v)]
    if len(branches) < 2 or rule == "none" or not _feeds_quantized(placement, node) or _bends_one_value(node):
        return
    if rule == "all":
        for index in branches:
            placement.read(node, index)
        _quantize_output(placement, node)
        return
    direct = [i for i in branches if _producer_type(node.inputs[i]) in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    for index in [i for i in branches if i not in direct[:1]][:1]:
        if placement.reads.get(_name(node.inputs[index])):
            placement.read(node, index)


def _feeds_quantized(placement: Placement, node: ir.Node) -> bool:
    """Whether a residual sum lies between quantized convolutions; in a transformer's float stream it does not.

    A sum of sums says nothing: a Linear layer's bias is an Add as well.
    """
    sources = {_producer_type(v) for v in node.inputs if v is not None}
    return bool(sources & {"Conv", "ConvTranspose", "Relu", "Clip"}) and not any(
        user.op_type == "LayerNormalization" for user, _ in after_fused(node).uses()
    )


def _bends_one_value(node: ir.Node) -> bool:
    """Whether a sum is a step of an activation function: what it adds are one value and powers of it, as in GELU's tanh form."""
    first, second = (_roots(value) for value in node.inputs if value is not None and not is_constant(value))
    return len(first | second) == 1


def _roots(value: ir.Value, depth: int = 4) -> set[str]:
    """Return the values of which this one is a product or a power, with constants and with each other."""
    producer = value.producer()
    if depth == 0 or producer is None or producer.op_type not in ("Mul", "Pow"):
        return {_name(value)}
    inputs = [one for one in producer.inputs if one is not None and not is_constant(one)]
    return {root for one in inputs for root in _roots(one, depth - 1)}


def _place_concat(placement: Placement, node: ir.Node) -> None:
    inputs = [v for v in node.inputs if v is not None and not is_constant(v)]
    shapes = [v.shape for v in (*inputs, node.outputs[0]) if v.shape is not None]
    if len(inputs) != len(node.inputs) or not placement.reads.get(_name(node.outputs[0])):
        return
    if any(_is_sequence(shape) for shape in shapes):
        return
    for index in range(len(inputs)):
        placement.read(node, index)
    placement.shared.append({_name(v) for v in (*inputs, node.outputs[0])})


def _joins_tokens(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Concat" and _is_sequence(producer.outputs[0].shape)


def _is_sequence(shape: ir.Shape | None) -> bool:
    return shape is not None and len(shape) == 3  # (N, tokens, C)


def _place_pooling(placement: Placement, node: ir.Node) -> None:
    source = node.inputs[0]
    if source is not None and placement.reads.get(_name(source)):
        placement.read(node, 0)
        _quantize_output(placement, node)


def has_attention(graph: ir.Graph) -> bool:
    """Whether a softmax feeds a product of two activations."""
    return any(n.op_type == "Softmax" and any(u.op_type == "MatMul" for u in n.outputs[0].consumers()) for n in graph)


def is_patch_embedding(node: ir.Node) -> bool:
    """Whether a convolution cuts the image into patches: it reads the graph's input, and its stride is its kernel."""
    source = node.inputs[0]
    if node.op_type != "Conv" or source is None or not source.is_graph_input():
        return False
    weight, strides = weight_of(node), node.attributes.get("strides")
    kernel = tuple(weight.shape)[2:] if weight is not None and weight.shape is not None else ()
    return strides is not None and tuple(strides.as_ints()) == kernel and max(kernel, default=1) > 1


def weight_of(node: ir.Node) -> ir.Value | None:
    """Return the constant weight of a weighted node, or None where both inputs are activations."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return value if is_constant(value) and value is not None and value.const_value is not None else None


def channel_axis(node: ir.Node) -> int:
    """Return the axis of the weight that is the output channel."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if _number(node, "transB", 0) else 1
    weight = weight_of(node)
    return 0 if node.op_type == "Conv" else len(weight.shape or ()) - 1 if weight is not None else 1


def after_fused(node: ir.Node) -> ir.Value:
    """Return the node's output, or that of the ReLU or Clip which alone reads it."""
    value = node.outputs[0]
    users = list(value.uses())
    if len(users) == 1 and users[0][0].op_type in FUSED and not value.is_graph_output():
        return users[0][0].outputs[0]
    return value


def weighted_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes that multiply by constant weights, in graph order."""
    yield from (n for n in graph if n.op_type in WEIGHTED and weight_of(n) is not None)


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer (or the output of a Constant node)."""
    return value is not None and (value.is_initializer() or _producer_type(value) == "Constant")


def _producer_type(value: ir.Value | None) -> str:
    producer = value.producer() if value is not None else None
    return producer.op_type if producer is not None else ""


def _name(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)
