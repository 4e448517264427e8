"""Kernels as a runtime names them go in, the model's own layers that they cover come out.

Read from the ONNX file itself, without the onnx package: a device that profiles an engine does not have it.
"""

from __future__ import annotations

import dataclasses
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rdeploy.backends import _wire
from rdeploy.measured import LayerTime, LayerTimes

_GRAPH, _NODE = 7, 1
_INPUT, _OUTPUT, _NAME, _OP_TYPE, _METADATA = 1, 2, 3, 4, 9
_KEY, _VALUE = 1, 2
"""Field numbers of ModelProto, GraphProto, NodeProto and its entries of metadata."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter says from which modules a node is: "['', 'layer1', 'layer1.0.conv1', 'conv2d_1']"."""
_ADDED = re.compile(r"^fused |(?:_nchwc|_token_\d+|/duplicated|/WithoutBiases|_quant|_\d+_of_\d+)$")
"""What ONNX Runtime and OpenVINO put around a layer's name when they replace it."""
_MAX_FUSED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of an ONNX graph, as far as names go; `module` is the model's own module that it is from, where it says so."""

    name: str = ""
    op_type: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    module: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The layers of a model, by their name and by the tensors that they write; empty where there is no ONNX file."""

    by_name: Mapping[str, Node] = field(default_factory=dict)
    by_output: Mapping[str, Node] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()

    def located(self, text: str) -> str:
        """Return for the first few nodes named in a text the modules that they are from: "node_Conv_7 is in layer1.0"."""
        found = [
            node
            for node in map(self.by_name.get, re.split(r"[^\w/:-]+|\.{2,}", text))
            if node is not None and node.module
        ]
        told = dict.fromkeys(f"{node.name} is in {node.module}" for node in found)
        return ", ".join(list(told)[:_MAX_FUSED])

    def covered(self, kernel: str, op_type: str = "") -> tuple[str, ...]:
        """Return the layers that a kernel covers, its main one first; empty where it is the runtime's own addition.

        A kernel is named after a layer, or after the tensor that the last of its fused layers writes: then the chain is
        followed back to the layer that does the kernel's work.
        """
        name = plain(kernel)
        if name in self.by_name:
            return (name,)
        last = self.by_output.get(name)
        chain: list[Node] = []
        while last is not None and len(chain) < _MAX_FUSED:
            chain.insert(0, last)
            if last.op_type == op_type or not op_type:
                break
            last = self.by_output.get(last.inputs[0]) if last.inputs else None
        if chain and op_type and chain[0].op_type != op_type:
            chain = chain[-1:]
        return tuple(node.name for node in chain)


def plain(kernel: str) -> str:
    """Return a kernel's name without what the runtime added to its layer's."""
    while (shorter := _ADDED.sub("", kernel)) != kernel:
        kernel = shorter
    return kernel


def read_names(onnx: Path) -> Names:
    """Return the names of an ONNX file's layers; none where it is no ONNX file."""
    try:
        with onnx.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            nodes = [
                node for start, end in _parts(content, 0, len(content), _GRAPH) for node in _nodes(content, start, end)
            ]
    except (OSError, ValueError, IndexError):
        return Names()
    named = {node.name: node for node in nodes if node.name}
    outputs = {output: node for node in nodes if node.name for output in node.outputs}
    return Names(by_name=named, by_output=outputs, nodes=tuple(nodes))


def named(times: LayerTimes, names: Names) -> LayerTimes:
    """Return the same times, kernels that a runtime names after a tensor being given the layer that writes it."""
    kernels = [
        dataclasses.replace(
            one, layers=tuple(dict.fromkeys(n for name in one.layers for n in names.covered(name) or (name,)))
        )
        for one in times.kernels
    ]
    return dataclasses.replace(times, kernels=tuple(kernels))


def summed(profiler: str, kernels: Sequence[LayerTime], *, whole_ms: float, runs: int) -> LayerTimes:
    """Return the kernels with what is missing to the whole: the runtime's own time between and around them."""
    rest = whole_ms - sum(kernel.mean_ms for kernel in kernels)
    return LayerTimes(profiler=profiler, runs=runs, whole_ms=whole_ms, remainder_ms=rest, kernels=tuple(kernels))


def _nodes(content: mmap.mmap, start: int, end: int) -> Iterator[Node]:
    for begin, stop in _parts(content, start, end, _NODE):
        yield Node(
            name="".join(_texts(content, begin, stop, _NAME)),
            op_type="".join(_texts(content, begin, stop, _OP_TYPE)),
            inputs=tuple(_texts(content, begin, stop, _INPUT)),
            outputs=tuple(_texts(content, begin, stop, _OUTPUT)),
            module=_module(content, begin, stop),
        )


def _module(content: mmap.mmap, start: int, end: int) -> str:
    """Return the innermost module of a node's scopes; the last scope is the operation itself."""
    for begin, stop in _parts(content, start, end, _METADATA):
        if "".join(_texts(content, begin, stop, _KEY)) == _SCOPES:
            scopes = re.findall(r"'([^']*)'", "".join(_texts(content, begin, stop, _VALUE)))
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


def _texts(content: mmap.mmap, start: int, end: int, number: int) -> Iterator[str]:
    for begin, stop in _parts(content, start, end, number):
        yield content[begin:stop].decode(errors="replace")


def _parts(content: mmap.mmap, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    """Yield where the values of one field of a message begin and end."""
    return ((begin, stop) for found, begin, stop in _wire.fields(content, start, end) if found == number)
