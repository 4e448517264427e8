"""Explain a Q/DQ graph tensor by tensor: the graph and images go in, ranges, clipping, SQNR and advice come out.

The exact side is the same graph without its activations' Q/DQ pairs: what rounding the weights cost is not in the figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported
from rdeploy.quantize.ranges import activations

_CLIPS, _CLOSE_DB, _MOST_DB = 0.005, 3.0, 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One quantized activation: its range and, where images were given, what it clips and how close it is to float.

    `own_db` is what rounding this tensor alone costs it, `sqnr_db` what has come together up to here.
    """

    name: str
    low: float
    high: float
    step: float
    clipped: float | None = None
    own_db: float | None = None
    sqnr_db: float | None = None
    advice: str = ""
    readers: tuple[str, ...] = ()
    """The layers that take it in rounded."""


def explain(path: Path, images: Sequence[NDArray[np.float32]] = ()) -> tuple[Tensor, ...]:
    """Return every quantized activation of the graph at `path`, in graph order.

    Raises:
        Unsupported: the graph holds no Q/DQ pairs.
    """
    model = ir.load(path)
    pairs = _pairs(model.graph)
    if not pairs:
        raise Unsupported(f"{path} holds no Q/DQ pairs: there is nothing to explain")
    ranges = {name: _range(quantize) for name, (quantize, _) in pairs.items()}
    readers = {
        name: tuple(user.name or "" for after in behind for user, _ in after.outputs[0].uses())
        for name, (_, behind) in pairs.items()
    }
    if not len(images):
        return tuple(
            Tensor(name=name, low=r[0], high=r[1], step=r[2], readers=readers[name]) for name, r in ranges.items()
        )
    for quantize, behind in pairs.values():
        for dequantize in behind:
            _bypass(model.graph, quantize, dequantize)
    with tempfile.TemporaryDirectory(prefix="rdeploy-explain-") as folder:
        exact = Path(folder) / "exact.onnx"
        ir.save(model, exact)
        sums = _sums(exact, path, ranges, images)
    return tuple(replace(_tensor(name, ranges[name], sums[name]), readers=readers[name]) for name in ranges)


def first_place(tensors: Sequence[Tensor]) -> str:
    """Say where the error enters: the first tensor whose own rounding explains what has come together by the end."""
    seen = [t for t in tensors if t.sqnr_db is not None and t.own_db is not None]
    if not seen:
        return "give images with --calib to see where the error enters"
    total = min(t.sqnr_db for t in seen if t.sqnr_db is not None)
    for tensor in seen:
        if tensor.own_db is not None and tensor.own_db <= total + _CLOSE_DB:
            return f"the error enters at {tensor.name!r}: {tensor.own_db:.1f} dB by itself, {total:.1f} dB at the worst tensor"
    return f"no tensor explains the error by itself: it comes together to {total:.1f} dB"


def _pairs(graph: ir.Graph) -> dict[str, tuple[ir.Node, list[ir.Node]]]:
    """Return, by the tensor that is rounded, its Q and all DQs behind it: layers in FP16 and in FP32 have one each."""
    found: dict[str, tuple[ir.Node, list[ir.Node]]] = {}
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "QuantizeLinear" and source is not None and source.name and not source.is_initializer():
            users = [user for user, _ in node.outputs[0].uses() if user.op_type == "DequantizeLinear"]
            if users:
                found.setdefault(source.name, (node, []))[1].extend(users)
    return found


def _bypass(graph: ir.Graph, quantize: ir.Node, dequantize: ir.Node) -> None:
    """Let the readers of a DQ read what its Q reads, in the type that the DQ writes: that of its scale."""
    value, output = quantize.inputs[0], dequantize.outputs[0]
    before, after = (_number(node, 1).dtype for node in (quantize, dequantize))
    if value is not None and before != after:
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.from_numpy(after))})
        cast.outputs[0].name = f"{output.name}/exact"
        graph.insert_before(dequantize, cast)
        value = cast.outputs[0]
    if value is not None:
        output.replace_all_uses_with(value, replace_graph_outputs=True)


def _range(quantize: ir.Node) -> tuple[float, float, float]:
    scale, zero = (np.asarray(_number(quantize, index)) for index in (1, 2))
    limits = np.iinfo(zero.dtype)
    step = float(scale.reshape(-1)[0])
    offset = int(zero.reshape(-1)[0])
    return (limits.min - offset) * step, (limits.max - offset) * step, step


def _number(node: ir.Node, index: int) -> NDArray[Any]:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return np.zeros((), np.uint8) if tensor is None else np.asarray(tensor.numpy())


def _sums(
    exact: Path, quantized: Path, ranges: dict[str, tuple[float, float, float]], images: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[np.float64]]:
    """Return per tensor: the signal's power, its own rounding's, the whole error's, the values clipped, all values."""
    sums = {name: np.zeros(5) for name in ranges}
    names = sorted(ranges)
    for truth, found in zip(activations(exact, names, images), activations(quantized, names, images)):
        for name, (low, high, step) in ranges.items():
            x = truth[name].astype(np.float64)
            rounded = np.clip(np.rint(x / step) * step, low, high)
            outside = (x < low - step / 2) | (x > high + step / 2)
            error = found[name] - x
            sums[name] += [
                np.square(x).sum(),
                np.square(rounded - x).sum(),
                np.square(error).sum(),
                outside.sum(),
                x.size,
            ]
    return sums


def _tensor(name: str, span: tuple[float, float, float], sums: NDArray[np.float64]) -> Tensor:
    signal, own, whole, outside, size = (float(number) for number in sums)
    low, high, step = span
    clipped, own_db = outside / size, _db(signal, own)
    found = Tensor(
        name=name, low=low, high=high, step=step, clipped=clipped, own_db=own_db, sqnr_db=_db(signal, whole),
        advice=_advice(clipped, own_db),
    )  # fmt: skip
    return found


def _advice(clipped: float, own_db: float) -> str:
    """Say what would repair a tensor; nothing where it is fine."""
    if own_db >= 30:
        return ""
    if clipped > _CLIPS:
        return "clips much: a wider range (--calibrator minmax), or more images"
    return "most of its values are small for its range: equalization, a narrower range (--calibrator mse), or keep it in float"


def _db(signal: float, noise: float) -> float:
    return _MOST_DB if noise == 0 else min(_MOST_DB, 10 * float(np.log10(max(signal, 1e-300) / noise)))
