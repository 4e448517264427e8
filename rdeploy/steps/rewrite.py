"""Rewrite a graph for a target: FP16 layers, operators that its runtime lacks, the preprocessing inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rdeploy import serde, spread
from rdeploy.data.calibration import NormalisedImages
from rdeploy.data.images import ImageSet
from rdeploy.steps import Steps
from rdeploy.steps.made import Embedded, Rounded, describe, described, read_rounded, resolution_of, versions
from rdeploy.types import ModelSpec, OnnxModel, format_size

OVERFLOW_IMAGES = 64
"""How many images the largest activations are looked for on; a margin covers the others."""


def rounded(steps: Steps, graph: OnnxModel, images: ImageSet, spec: ModelSpec) -> Rounded:
    """Return a variant's graph, FP32 or INT8, with its float layers in FP16 where that is safe on these images.

    Overflow is looked for in that graph itself: equalization gave its tensors other sizes than those of the exported one.
    """
    resolution = resolution_of(graph)
    pixels = steps.pixels(images, resolution, spec)

    def write(folder: Path) -> None:
        import onnx_ir as ir

        from rdeploy import export
        from rdeploy.graph import fp16
        from rdeploy.quantize.ranges import largest

        with steps.stage("fp16", format_size(resolution)):
            every = NormalisedImages(pixels, spec)
            seen = [every[i] for i in spread.evenly(len(every), OVERFLOW_IMAGES)]
            model = ir.load(graph.path)
            made = fp16.convert(model, largest=largest(Path(graph.path), seen))
            fp16.check_typed(model)
            ir.save(model, folder / "model.onnx")
            export.check_graph(export.describe(folder / "model.onnx", precision="fp16"))
        facts = serde.to_json(replace(made, samples=len(seen)))
        precision = "fp16" if graph.precision == "fp32" else graph.precision
        describe(folder / "model.onnx", precision, {"fp16": facts})

    facts = [graph.sha256, images.sha256, spec.preprocessing, versions()]
    return read_rounded(steps.store.make("fp16", serde.digest(facts), write) / "model.onnx")


def lowered(steps: Steps, graph: OnnxModel, operators: Sequence[str]) -> OnnxModel:
    """Return a graph in which these operators are written with others, for a runtime that lacks them."""

    def write(folder: Path) -> None:
        import onnx_ir as ir

        from rdeploy import export
        from rdeploy.graph import lower

        model = ir.load(graph.path)
        lower.lower(model, operators)
        ir.save(model, folder / "model.onnx")
        export.check_graph(export.describe(folder / "model.onnx", precision=graph.precision))
        describe(folder / "model.onnx", graph.precision, {})

    folder = steps.store.make("lowered", serde.digest([graph.sha256, list(operators), versions()]), write)
    return described(folder / "model.onnx")[0]


def embedded(steps: Steps, graph: OnnxModel, spec: ModelSpec) -> Embedded:
    """Return a variant's graph with the resize from the native size and the normalisation in front of it."""

    def write(folder: Path) -> None:
        import onnx_ir as ir

        from rdeploy import export
        from rdeploy.graph import embed

        with steps.stage("embed", format_size(spec.native_resolution)):
            model = ir.load(graph.path)
            embed.embed(model, spec.native_resolution, spec.preprocessing)
            ir.save(model, folder / "model.onnx")
            export.check_graph(export.describe(folder / "model.onnx", precision=graph.precision))
            if program is not None:
                size, dynamic = resolution_of(graph), steps.dynamic_batch
                export.embed_program(program, spec, size, folder / "model.pt2", dynamic_batch=dynamic)
            describe(folder / "model.onnx", graph.precision, {})

    beside = Path(graph.path).with_suffix(".pt2")
    program = beside if beside.is_file() else None
    facts = [graph.sha256, spec.native_resolution, spec.preprocessing, program is not None, versions()]
    key = serde.digest(facts)
    onnx, cost, _ = described(steps.store.make("embed", key, write) / "model.onnx")
    return Embedded(onnx=onnx, cost=cost)
