"""Watch the activations of an FP32 graph over the calibration images: a graph and batches go in, histograms come out.

One pass, whatever the calibrator; what is kept is one histogram per tensor, so memory does not grow with the images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import StageError
from rdeploy.quantize import calibrators, heap
from rdeploy.quantize.channels import clip_limit, is_relu_n
from rdeploy.quantize.histogram import Histogram
from rdeploy.quantize.importance import channel_axes, channel_weights

Range = tuple[float, float]
_INSIDE = 1 - 2**-22
"""A range that ends at a limit ends a rounding error of its scale before it: only then a runtime drops the Clip in front."""


class Signed(NamedTuple):
    """A `Range` of signed integers without a zero point, whatever the scheme's other activations are."""

    low: float
    high: float


class Lowered(NamedTuple):
    """A `Range` of signed integers whose zero point goes into biases (`lowering.py`)."""

    low: float
    high: float


def observe(
    path: Path, tensors: Sequence[str], batches: Iterable[NDArray[np.float32]], *, threads: int | None = None
) -> dict[str, Histogram]:
    """Run the graph over `batches` (N, C, H, W) and return a histogram for every tensor named.

    Raises:
        StageError: an activation is NaN or infinite; the message names the tensor.
    """
    graph = ir.load(path).graph
    weights, axes, ceilings = channel_weights(graph), channel_axes(graph), _ceilings(graph)
    del graph
    histograms = {
        name: Histogram(weights=weights.get(name), axis=axes.get(name, 1), ceiling=ceilings.get(name, np.inf))
        for name in tensors
    }
    with ThreadPoolExecutor(1) as pool:  # counting one batch overlaps with running the next
        pending = None
        for values in activations(path, tensors, batches, threads=threads):
            if pending is not None:
                pending.result()
            pending = pool.submit(_update, histograms, values)
        if pending is not None:
            pending.result()
    return histograms


def _ceilings(graph: ir.Graph) -> dict[str, float]:
    """Return what no image exceeds: the upper ends of the ReLUs that have one, by the tensor that they write."""
    clips = [node for node in graph if node.op_type == "Clip" and is_relu_n(node)]
    return {node.outputs[0].name or "": clip_limit(node) * _INSIDE for node in clips}


def _update(histograms: dict[str, Histogram], values: dict[str, NDArray[Any]]) -> None:
    for name, array in values.items():
        try:
            histograms[name].update(array)
        except FloatingPointError as error:
            raise StageError(
                "quantize", f"{error}: {name!r} while calibrating; the FP32 model itself is broken"
            ) from error


def activations(
    path: Path, tensors: Sequence[str], batches: Iterable[NDArray[np.float32]], *, threads: int | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """Run a graph over `batches` and yield the named tensors of each; inputs and outputs can be named as well.

    A graph is judged by what it says, not by what this CPU's kernels make of it: Q/DQ pairs are evaluated in float, so that
    every machine chooses the same.
    """
    model = ir.load(path)
    outputs = {value.name for value in model.graph.outputs}
    inputs = {value.name for value in model.graph.inputs}
    inner = [n for n in tensors if n not in outputs and n not in inputs]
    produced = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(produced[name] for name in inner)
    session = session_of(model, threads=threads)
    del model, produced
    feed = session.get_inputs()[0].name
    wanted = [n for n in tensors if n not in inputs]
    for batch in batches:
        values = dict(zip(wanted, session.run(wanted, {feed: batch}) if wanted else []))
        yield values | ({feed: batch} if feed in tensors else {})


def float_outputs(graph: Path | ir.Model, batches: Iterable[NDArray[np.float32]]) -> Iterator[list[NDArray[Any]]]:
    """Run a graph over `batches`, as `activations` does, and yield its outputs in floating point.

    One in memory loses its weights (`session_of`).
    """
    session = session_of(graph) if isinstance(graph, ir.Model) else open_session(graph)
    names = [output.name for output in session.get_outputs() if output.type in _FLOAT_TYPES]
    feed = session.get_inputs()[0].name
    for batch in batches:
        yield session.run(names, {feed: batch})


_FLOAT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)")


def session_of(model: ir.Model, *, threads: int | None = None) -> Any:
    """Return a session over a graph in memory, which loses its weights: the session reads them from a file.

    Of bytes it would keep a second copy.
    """
    with tempfile.TemporaryDirectory(prefix="rdeploy-") as folder:
        path = Path(folder) / "graph.onnx"
        ir.save(model, path, external_data="weights")
        for value in model.graph.initializers.values():
            value.const_value = None
        return open_session(path, threads=threads)


def open_session(path: Path, *, threads: int | None = None) -> Any:
    """Return an ONNX Runtime session on the CPU over a graph, its Q/DQ pairs evaluated in float."""
    import onnxruntime

    heap.release(sum(file.stat().st_size for file in (path, path.with_name("weights")) if file.exists()))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting costs others their processor
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # an arena keeps what its largest run took
    if threads:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def largest(path: Path, batches: Iterable[NDArray[np.float32]]) -> dict[str, float]:
    """Run the graph over `batches` and return the largest absolute value that each float tensor takes, by name.

    The graph itself reduces every tensor to one number, so memory does not grow with it.
    """
    model = ir.load(path)
    names = _add_peaks(model.graph)
    found = dict.fromkeys(names.values(), 0.0)
    session = session_of(model)
    feed = session.get_inputs()[0].name
    for batch in batches:
        for output, peak in zip(names, session.run(list(names), {feed: batch})):
            found[names[output]] = max(found[names[output]], float(peak))
    return found


def _add_peaks(graph: ir.Graph) -> dict[str, str]:
    """Add the largest absolute value of every float tensor to the graph's outputs; return output -> tensor."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    names = {}
    for value in [v for v in values if v.dtype == ir.DataType.FLOAT and v.name]:
        size = ir.node("Abs", [value], name=f"{value.name}/abs")
        peak = ir.node("ReduceMax", [size.outputs[0]], attributes={"keepdims": 0}, name=f"{value.name}/peak")
        size.outputs[0].name, peak.outputs[0].name = f"{value.name}/abs", f"{value.name}/peak"
        peak.outputs[0].dtype, peak.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
        graph.extend([size, peak])
        graph.outputs.append(peak.outputs[0])
        names[f"{value.name}/peak"] = value.name or ""
    return names


def find_ranges(
    histograms: dict[str, Histogram],
    *,
    calibrator: str,
    options: Any,
    symmetric: bool,
    shared: Iterable[set[str]] = (),
) -> dict[str, Range]:
    """Return (low, high) for every tensor; the tensors of one `shared` group (none overlap) get their common hull.

    No range goes beyond the limit of a ReLU6 that writes the tensor. Nothing is there, and a runtime would have to keep it: where
    a pair saturates first ONNX Runtime drops the Clip, and has one integer convolution in place of a float one between pairs.
    """
    plugin = calibrators.find(calibrator)
    found = {name: plugin.find_range(h, options, symmetric=symmetric) for name, h in histograms.items()}
    ranges = {
        name: (max(low, -histograms[name].ceiling), min(high, histograms[name].ceiling))
        for name, (low, high) in found.items()
    }
    for group in shared:
        known = [ranges[name] for name in group if name in ranges]
        if known:
            hull = (min(low for low, _ in known), max(high for _, high in known))
            ranges.update({name: hull for name in group if name in ranges})
    return ranges
