"""What is said of a Q/DQ graph, against ranges and errors that are known."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.graph import fp16  # noqa: E402
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


def test_pairs_between_fp16_and_fp32_are_explained_all_of_them(tmp_path):
    """The softmax and the sum stay FP32: `r` has a DQ for a layer in FP16, and one for a layer in FP32."""
    body = "a = Conv(x, w) r = Relu(a) c = Conv(r, v) s = ReduceSum(r) y = Mul(c, s)"
    path = TEXT["write"](tmp_path / "fp32.onnx", body, w=W(4, 3, 1, 1), v=W(2, 4, 1, 1))
    model, images = ir.load(path), [W(1, 3, 8, 8, seed=i) for i in range(4)]
    scheme = QuantScheme(name="s", activations="int8", ops=("Conv", "ReduceSum"))
    qdq.insert(model, place(model, scheme), {"x": (-4.0, 4.0), "r": (-8.0, 8.0)}, scheme)
    ir.save(model, tmp_path / "int8.onnx")
    exact = explain.explain(tmp_path / "int8.onnx", images)
    fp16.convert(model)
    ir.save(model, tmp_path / "fp16.onnx")

    found = explain.explain(tmp_path / "fp16.onnx", images)

    assert {t.name.partition("::")[0].removesuffix("_fp16") for t in found} == {"x", "r"}
    assert found[-1].readers == exact[-1].readers
    assert [t.own_db for t in found] == pytest.approx([t.own_db for t in exact], abs=0.1)
    assert [t.sqnr_db for t in found] == pytest.approx([t.sqnr_db for t in exact], abs=0.1)


def test_a_graph_without_pairs_is_refused(tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", "y = Relu(x)")

    with pytest.raises(Unsupported, match="holds no Q/DQ pairs: there is nothing to explain"):
        explain.explain(path)
