"""What rounding does to each tensor of a variant's INT8 graph: a row of a build goes in, a file for its report comes out."""

from __future__ import annotations

from pathlib import Path

from rdeploy import serde
from rdeploy.compare import Row
from rdeploy.data.calibration import NormalisedImages
from rdeploy.errors import RdeployError
from rdeploy.intake import Build

FILE = "quantization.json"
IMAGES = 8
"""On how many images: the figures are sums over all values of a tensor, and settle early."""


def written(this: Build, row: Row) -> Path | None:
    """Return a file with every quantized tensor, its range, its error and the layers that read it; None without INT8."""
    if row.quantized is None:
        return None
    graph = row.quantized.onnx
    spec = this.spec_of(row.variant)
    pixels = this.steps.pixels(this.calib, row.variant.resolution, spec)

    def write(folder: Path) -> None:
        from rdeploy.quantize import explain

        with this.steps.stage("explain", row.variant.id):
            images = NormalisedImages(pixels, spec)[:IMAGES]
            found = explain.explain(Path(graph.path), list(images))
        (folder / FILE).write_text(serde.dumps({"images": len(images), "tensors": found}), encoding="utf-8")

    key = serde.digest([graph.sha256, this.calib.sha256, spec.preprocessing, IMAGES])
    try:
        return this.steps.store.make("explain", key, write) / FILE
    except RdeployError:  # an INT8 graph without a quantized activation has nothing to explain
        return None
