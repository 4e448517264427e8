"""What is said of a Q/DQ graph, against ranges and errors that are known."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.quantize import explain, qdq  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SCHEME = QuantScheme(name="s", activations="int8", ops=("Conv",))


def written(tmp_path, ranges):
    path = TEXT["write"](tmp_path / "fp32.onnx", "a = Conv(x, w) y = Conv(a, v)", w=W(4, 3, 1, 1), v=W(2, 4, 1, 1))
    model = ir.load(path)
    qdq.insert(model, place(model, SCHEME), ranges, SCHEME)
    ir.save(model, tmp_path / "int8.onnx")
    return tmp_path / "int8.onnx"


def test_without_images_it_lists_the_ranges(tmp_path):
    x, a = explain.explain(written(tmp_path, {"x": (-1.27, 1.27), "a": (-12.7, 12.7)}))

    assert (x.name, a.name) == ("x", "a")
    assert (x.high, x.step) == pytest.approx((1.27, 0.01))
    assert (a.low, a.step) == pytest.approx((-12.8, 0.1))
    assert x.sqnr_db is None
    assert "--calib" in explain.first_place((x, a))


def test_the_tensor_that_clips_is_where_the_error_enters(tmp_path):
    image = np.ones((1, 3, 8, 8), np.float32)
    image[:, :, :2] = 4.0  # a quarter of the values, beyond the range of x

    x, a = explain.explain(written(tmp_path, {"x": (-1.0, 1.0), "a": (-40.0, 40.0)}), [image])

    assert x.clipped == 0.25
    assert x.own_db == pytest.approx(10 * np.log10((0.75 + 4.0) / (0.25 * 9)), abs=0.05)
    assert x.advice.startswith("clips much")
    assert x.sqnr_db == 200  # nothing comes before it
    assert a.clipped == 0
    assert a.own_db > 25
    assert explain.first_place((x, a)).startswith("the error enters at 'x'")


def test_a_range_that_is_far_too_wide_is_said(tmp_path):
    image = W(1, 3, 8, 8)

    x, _ = explain.explain(written(tmp_path, {"x": (-300.0, 300.0), "a": (-10.0, 10.0)}), [image])

    assert x.clipped == 0
    assert x.advice.startswith("most of its values are small for its range")


def test_a_graph_without_pairs_is_refused(tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", "y = Relu(x)")

    with pytest.raises(Unsupported, match="holds no Q/DQ pairs: there is nothing to explain"):
        explain.explain(path)
