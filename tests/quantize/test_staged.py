"""A graph in stages: what lies between two of them can be looked at."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")
pytest.importorskip("onnxruntime", reason="stages are run by ONNX Runtime")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import staged  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
IMAGE = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)


def graph():
    body = "a = Relu(x) b = Sigmoid(a) c = Add(a, b) y = Relu(c)"
    return ir.from_proto(TEXT["model"](body)).graph


def test_stages_one_after_the_other_compute_what_the_graph_does():
    stages = staged.split(graph(), lambda node, live: node.op_type in ("Relu", "Sigmoid"))

    state = {"x": IMAGE}
    for stage in stages:
        state = stage.run(state)

    a = np.maximum(IMAGE, 0)
    assert [len(stage.nodes) for stage in stages] == [1, 1, 2]
    assert state["y"] == pytest.approx(a + 1 / (1 + np.exp(-a)), abs=1e-6)


def test_a_stage_gives_what_is_asked_for_besides():
    (only,) = staged.split(graph(), lambda node, live: False)

    found = only.run({"x": IMAGE}, ("b",))

    assert sorted(found) == ["b", "y"]


def test_a_stage_without_nodes_hands_its_state_on():
    """A layer that reads what the stage before has written needs nothing computed first."""
    found = staged.Stage([], ("a",), ("a",)).run({"a": IMAGE, "other": IMAGE})

    assert list(found) == ["a"]
    assert found["a"] is IMAGE


def test_what_was_read_through_a_pair_is_not_kept():
    """Behind the last reader of a tensor the state holds it no longer, rounded or not."""
    for ranges in (None, {"r": (0.0, 6.0), "c": (-9.0, 9.0)}):
        body = "r = Relu(x) c = Conv(r, w) y = Conv(c, u)"
        model = ir.from_proto(TEXT["model"](body, w=TEXT["normal"](4, 3, 1, 1), u=TEXT["normal"](4, 4, 1, 1)))
        scheme = QuantScheme(name="affine", activations="uint8", ops=("Conv",))
        staged.separate_reads(place(model, scheme), ranges, scheme)
        stages = staged.split(model.graph, lambda node, live: node.op_type == "Conv")

        assert stages[0].writes == ("c",)
