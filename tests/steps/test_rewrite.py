"""Rewriting for a target: overflow is looked for in the graph that is converted."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

from rdeploy import export  # noqa: E402
from rdeploy.data.images import ImageSet  # noqa: E402
from rdeploy.quantize.channels import SMOOTHED  # noqa: E402
from rdeploy.steps import Steps, rewrite  # noqa: E402
from rdeploy.store import Store  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing, Target  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
SPEC = ModelSpec(
    name="m",
    source="m",
    sha256="",
    native_resolution=(8, 8),
    preprocessing=Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", crop_pct=1.0),
)
WHITE = ImageSet(
    paths=("a", "b"), labels=None, class_names=(), sha256="s", array=np.full((2, 8, 8, 3), 255, np.uint8), rows=(0, 1)
)


@pytest.mark.parametrize("large", ["a", f"a{SMOOTHED}"])
def test_what_equalization_and_smoothing_made_too_large_stays_fp32(large, tmp_path):
    """The exported graph has no such tensor, or a small one of that name."""
    body = "b = Mul(x, up) a = Identity(b) c = Mul(a, down) d = Conv(c, w) y = Relu(d)"
    facts = {"up": np.float32(30000), "down": np.float32(1 / 30000), "w": TEXT["normal"](4, 3, 1, 1)}
    graph = TEXT["model"](body, **facts)
    for node in graph.graph.node:
        node.input[:] = [large if name == "a" else name for name in node.input]
        node.output[:] = [large if name == "a" else name for name in node.output]
    for value in graph.graph.value_info:
        value.name = large if value.name == "a" else value.name
    path = tmp_path / "int8.onnx"
    path.write_bytes(graph.SerializeToString())
    steps = Steps(target=Target(name="t"), store=Store(tmp_path / "store"), progress=lambda text: None)

    made = rewrite.rounded(steps, export.describe(path, precision="int8"), WHITE, SPEC)

    kept = dict(made.fp16.kept)
    assert kept["c"] == f"reads {large!r}, which reaches 30000 on the calibration images"
    assert "d" not in kept
