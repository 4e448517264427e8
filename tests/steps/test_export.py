"""A graph that was made from an ONNX file has to run before anything is built of it."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'rdeploy[torch]'")
export = pytest.importorskip("rdeploy.export", reason="PyTorch is not installed: pip install 'rdeploy[torch]'")

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.graph import spatial  # noqa: E402
from rdeploy.steps.export import check_runs  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parents[1] / "onnx_text.py"))


def net(folder):
    """Write a graph that picks all rows of an image of 8x8 by their numbers."""
    rows = np.arange(8, dtype=np.int64)
    TEXT["write"](folder / "net.onnx", "y = Gather<axis=2>(x, i)", x=(1, 3, 8, 8), i=rows)
    return folder / "net.onnx"


def test_a_graph_that_was_re_sized_well_runs(tmp_path):
    check_runs(export.prepare(net(tmp_path), (6, 4), tmp_path / "new.onnx"), "net.onnx")


def test_what_a_re_sizing_missed_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(spatial._REWRITES, "Gather")  # as if nobody had thought of it
    missed = export.prepare(net(tmp_path), (6, 4), tmp_path / "new.onnx")

    with pytest.raises(Unsupported, match=r"net.onnx does not run at 6x4: .*indices element out of data bounds"):
        check_runs(missed, "net.onnx")


def test_an_output_of_another_shape_is_refused(tmp_path):
    found = export.prepare(net(tmp_path), (8, 8), tmp_path / "new.onnx")
    other = dataclasses.replace(found.outputs[0], shape=(1, 3, 4, 4))

    with pytest.raises(
        Unsupported, match="cannot be re-sized to 8: its output y has another shape than its layers give it"
    ):
        check_runs(dataclasses.replace(found, outputs=(other,)), "net.onnx")
