"""Give every backend of a row the graph that it is to build: quantized, rounded, lowered, with the preprocessing inside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rdeploy import backends, expectations, preflight
from rdeploy.compare import Row
from rdeploy.intake import Build
from rdeploy.steps import quantize, rewrite
from rdeploy.types import QuantOptions


def quantize_graphs(this: Build, row: Row) -> None:
    """Give every backend the INT8 graph of its scheme."""
    schemes = {name: backends.find(name).scheme(this.target) for name in this.graphs_for}
    distinct = {replace(scheme, name=""): scheme for scheme in reversed(schemes.values())}
    quant = row.variant.quant or QuantOptions()
    known = this.judged.labels is not None or this.judged.masks is not None
    labelled = this.judged if this.request.data and known else None
    order = tuple(reversed(distinct.values()))  # the first backend decides what falls back to float
    spec, void = this.spec_of(row.variant), this.request.void
    made = quantize.quantized(this.steps, row.exported, order, this.calib, spec, quant, labelled, void)
    by_backend = {name: made[distinct[replace(scheme, name="")].name] for name, scheme in schemes.items()}
    row.graphs = {name: quantized.onnx for name, quantized in by_backend.items()}
    row.quantized = by_backend[this.graphs_for[0]]
    if any(one.quantization.fallbacks and one.quantization.fallbacks.layers for one in made.values()):
        row.variant = replace(row.variant, precision="mixed")


def round_graphs(this: Build, row: Row) -> None:
    """Give the backends that compute in FP16 a graph whose float layers are FP16; an FP16 variant is built for no others."""
    fits = expectations.computes_fp16 if row.variant.precision == "fp16" else expectations.mixes_int8_with_fp16
    for name in [name for name in row.graphs if fits(this.target, name)]:
        rounded = rewrite.rounded(this.steps, row.graphs[name], this.calib, this.spec_of(row.variant))
        row.graphs[name], row.rounded = rounded.onnx, row.rounded or rounded
    if row.variant.precision == "fp16":
        left = [name for name in row.graphs if not expectations.computes_fp16(this.target, name)]
        row.graphs = {name: onnx for name, onnx in row.graphs.items() if name not in left}
        if left:
            row.notes += (f"not built for {', '.join(left)}: what they would execute is FP32 with casts",)


def lower_graphs(this: Build, row: Row) -> None:
    """Write what the target's TensorRT lacks with operators that it has, where there is a way."""
    for name, onnx in row.graphs.items():
        if operators := preflight.to_be_lowered(Path(onnx.path), name, this.target):
            row.graphs[name] = rewrite.lowered(this.steps, onnx, operators)
            title = f"{name} {preflight.version(name, this.target)}"
            row.notes += (f"{title} has no {', '.join(operators)}: written with other operators",)


def embed_preprocessing(this: Build, row: Row) -> None:
    """Give every backend its graph with the preprocessing inside; what is quantized or rounded is the inner graph."""
    spec = this.spec_of(row.variant)
    row.inner, row.embedded = row.graphs, rewrite.embedded(this.steps, row.exported.onnx, spec)
    row.graphs = {name: rewrite.embedded(this.steps, onnx, spec).onnx for name, onnx in row.inner.items()}
