"""Run a graph in stages, so that what lies between two stages can be looked at and changed: a model goes in, stages come out.

The state between two stages is every activation that a later stage reads, by name. Where one of them is changed, only the
stages behind it have to run again; a stage whose weights were changed is rebuilt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.quantize import qdq
from rdeploy.quantize.placement import Placement
from rdeploy.quantize.ranges import Range
from rdeploy.types import QuantScheme

State = dict[str, NDArray[Any]]
QUANTIZED = "::quantized"


@dataclass(slots=True)
class Stage:
    """Some nodes in graph order; `reads` and `writes` are the activations that come in and that later stages need."""

    nodes: list[ir.Node]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    _session: Any = field(default=None, repr=False)

    def run(self, state: State, more: Sequence[str] = ()) -> State:
        """Return the state after this stage, with the tensors of `more` from inside it besides."""
        wanted = [*self.writes, *(name for name in more if name not in self.writes)]
        made = {value.name for node in self.nodes for value in node.outputs}
        computed = [name for name in wanted if name in made]
        known = {name: state[name] for name in wanted if name not in made}
        if not computed:
            return known
        inputs = {name: state[name] for name in self.reads}
        self._session = self._session or _session(self.nodes, inputs)
        return known | dict(zip(computed, self._session.run(computed, inputs)))

    def forget(self) -> None:
        """Build the stage anew the next time that it runs: its weights have changed."""
        self._session = None


def separate_reads(
    placement: Placement, ranges: Mapping[str, Range] | None = None, scheme: QuantScheme | None = None
) -> dict[str, str]:
    """Let every reader that will read a tensor quantized read a copy of its own; return the copies' names by tensor.

    A tensor may be read in float elsewhere; the copy can then be rounded alone. With `ranges` it is rounded for `scheme`:
    the graph has the same tensors, and nodes of the same names end in them.
    """
    copies: dict[str, str] = {}
    for name, readers in placement.reads.items():
        source = readers[0][0].inputs[readers[0][1]]
        graph = readers[0][0].graph
        if source is None or not isinstance(graph, ir.Graph):
            continue
        copies[name] = f"{name}{QUANTIZED}"
        if ranges is None or scheme is None:
            made = [ir.node("Identity", [source])]
        else:
            made = _rounding(graph, source, ranges[name], scheme)
        made[-1].name = made[-1].outputs[0].name = copies[name]
        made[-1].outputs[0].dtype, made[-1].outputs[0].shape = source.dtype, source.shape
        producer = source.producer()
        if producer is None:
            graph.insert_before(graph[0], made)
        else:
            graph.insert_after(producer, made)
        for node, index in readers:
            node.replace_input_with(index, made[-1].outputs[0])
    return copies


def _rounding(graph: ir.Graph, source: ir.Value, span: Range, scheme: QuantScheme) -> list[ir.Node]:
    scale, zero_point, _, _ = qdq.grid(span, scheme)
    pair = [
        qdq.constant(graph, f"{source.name}::{kind}", np.asarray(number))
        for kind, number in (("scale", scale), ("zero_point", zero_point))
    ]
    clip = qdq.narrowed(graph, source, span, scheme, f"{source.name}::narrowed")
    held = clip[0].outputs[0] if clip else source
    quantize = ir.node("QuantizeLinear", [held, *pair], name=f"{source.name}::integers")
    quantize.outputs[0].name = f"{source.name}::integers"
    return [*clip, quantize, ir.node("DequantizeLinear", [quantize.outputs[0], *pair])]


def split(graph: ir.Graph, cut: Callable[[ir.Node, list[ir.Value]], bool]) -> list[Stage]:
    """Split a graph behind every node where `cut(node, live)` says so; `live` is what later nodes still read."""
    nodes = list(graph)
    outputs = {id(value) for value in graph.outputs}
    left = {id(v): len(list(v.uses())) for v in [*graph.inputs, *(o for n in nodes for o in n.outputs)]}
    live: dict[int, ir.Value] = {id(value): value for value in graph.inputs if left[id(value)]}
    stages: list[Stage] = []
    reads, held = tuple(v.name or "" for v in live.values()), []
    for position, node in enumerate(nodes):
        held.append(node)
        for value in node.inputs:
            if value is not None and id(value) in left:
                left[id(value)] -= 1
                if not left[id(value)] and id(value) not in outputs:
                    live.pop(id(value), None)
        live.update({id(v): v for v in node.outputs if left[id(v)] or id(v) in outputs})
        if position == len(nodes) - 1 or cut(node, list(live.values())):
            writes = tuple(v.name or "" for v in live.values())
            used = {v.name for n in held for v in n.inputs if v is not None}
            stages.append(Stage(held, tuple(name for name in reads if name in used), writes))
            reads, held = writes, []
    return stages


def _session(nodes: Iterable[ir.Node], inputs: State) -> Any:
    """Return an ONNX Runtime session over some nodes; `inputs` are examples of what comes in."""
    import onnx
    import onnxruntime

    nodes = list(nodes)
    constants: dict[str, Any] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.const_value is not None and value.name:
                constants[value.name] = onnx.numpy_helper.from_array(value.const_value.numpy(), value.name)
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "stage",
        [onnx.helper.make_tensor_value_info(n, k, list(inputs[n].shape)) for n, k in kinds.items()],
        [onnx.ValueInfoProto(name=v.name) for node in nodes for v in node.outputs if v.name],
        list(constants.values()),
    )
    owner = nodes[0].graph
    opset = owner.opset_imports.get("", 18) if isinstance(owner, ir.Graph) else 18
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # many short runs: waiting must cost nothing
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # in float: integer kernels differ by processor
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def state_bytes(live: Iterable[ir.Value]) -> int:
    """Return the size of a state, as far as the shapes are known."""
    total = 0
    for value in live:
        sides = [s if isinstance(s, int) else 1 for s in value.shape] if value.shape is not None else [1]
        total += 4 * int(np.prod(sides))
    return total
