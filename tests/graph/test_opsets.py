"""The same graph at every opset from 17 to 20: valid there, and the same function."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.graph import opsets  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
IMAGE = W(1, 4, 8, 8, seed=3)

GRAPHS = {
    "convolutions": ("c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) y = GlobalAveragePool(r)", {"w": W(5, 4, 3, 3)}),
    "mean": ("y = ReduceMean<keepdims=0>(x, axes)", {"axes": np.array([2, 3])}),
    "mean of everything": ("y = ReduceMean<keepdims=1>(x)", {}),
    "maximum": ("y = ReduceMax<keepdims=1, noop_with_empty_axes=0>(x, axes)", {"axes": np.array([1])}),
    "norm": ("y = ReduceL2<keepdims=1>(x, axes)", {"axes": np.array([-1])}),
    "halves": ("a, b = Split<axis=1, num_outputs=2>(x) y = Sub(a, b)", {}),
    "uneven parts": ("a, b = Split<axis=1>(x, parts) y = Mul(a, b)", {"parts": np.array([1, 3])}),
    "padding": ("y = Pad(x, pads, v)", {"pads": np.array([0, 0, 1, 1, 0, 0, 2, 2]), "v": np.float32(0.5)}),
    "padding of two axes": (
        "y = Pad(x, pads, v, axes)",
        {"pads": np.array([1, 0, 2, 3]), "v": np.float32(0.5), "axes": np.array([2, -1])},
    ),
    "reflection of two axes": (
        'y = Pad<mode="reflect">(x, pads, , axes)',
        {"pads": np.array([1, 0, 2, 3]), "axes": np.array([3, 2])},
    ),
    "nearest": (
        'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, , factors)',
        {"factors": np.array([1, 1, 2, 2], np.float32)},
    ),
    "bilinear": ('y = Resize<mode="linear", antialias=0>(x, , , sizes)', {"sizes": np.array([1, 4, 5, 11])}),
    "linear layer": ("f = Flatten(x) y = Gemm<transB=1>(f, w)", {"w": W(3, 256)}),
    "layer normalisation": ("y = LayerNormalization<axis=-1>(x, g)", {"g": W(8)}),
    "pairs": (
        "q = QuantizeLinear(x, step, zero) y = DequantizeLinear(q, step, zero)",
        {"step": np.float32(0.02), "zero": np.uint8(100)},
    ),
}


def converted(folder, body, arrays, opset, *, start=18):
    path = TEXT["write"](folder / "before.onnx", body, x=IMAGE.shape, opset=start, **arrays)
    model = ir.load(path)
    opsets.convert(model, opset)
    ir.save(model, folder / "after.onnx")
    return path, folder / "after.onnx"


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("opset", [17, 18, 19, 20])
def test_a_graph_is_valid_at_every_opset_and_computes_the_same(opset, graph, tmp_path):
    before, after = converted(tmp_path, *GRAPHS[graph], opset)

    onnx.checker.check_model(str(after), full_check=True)
    assert opsets.opset_of(ir.load(after)) == opset
    np.testing.assert_allclose(TEXT["run"](after, IMAGE), TEXT["run"](before, IMAGE), rtol=1e-6)


@pytest.mark.parametrize("opset", [16, 21])
def test_an_opset_outside_17_to_20_is_refused(opset, tmp_path):
    with pytest.raises(Unsupported) as caught:
        converted(tmp_path, "y = Relu(x)", {}, opset)

    assert str(caught.value) == f"opset {opset} is outside 17 to 20; change it in the target profile"


@pytest.mark.parametrize(
    ("body", "arrays", "message"),
    [
        (
            'y = Resize<mode="linear", antialias=1>(x, , , sizes)',
            {"sizes": np.array([1, 4, 4, 4])},
            "layer 'y' resizes with antialias, which opset 17 does not have",
        ),
        (
            'y = Resize<mode="linear", axes=[2,3]>(x, , , sizes)',
            {"sizes": np.array([4, 4])},
            "layer 'y' resizes with axes, which opset 17 does not have",
        ),
        (
            'y = Resize<mode="linear", keep_aspect_ratio_policy="not_larger">(x, , , sizes)',
            {"sizes": np.array([1, 4, 4, 6])},
            "layer 'y' resizes with keep_aspect_ratio_policy, which opset 17 does not have",
        ),
        ("y = Mish(x)", {}, "layer 'y' is Mish, which opset 17 does not have; the target needs opset 18"),
        (
            "y = GroupNormalization<num_groups=2>(x, s, b)",
            {"s": W(2), "b": W(2), "check": False},
            "layer 'y' is GroupNormalization, which opset 17 does not have; the target needs opset 18",
        ),
        (
            "s = Shape(x) t = Slice(s, from, to) axes = Mul(t, zero) m = ReduceMean(x, axes) y = Reshape(m, shape)",
            {"shape": np.array([1, 256]), "from": np.array([0]), "to": np.array([1]), "zero": np.array([0])},
            "layer 'm' computes its axes at run time, which opset 17 cannot express",
        ),
        (
            "y = ReduceMean<noop_with_empty_axes=1>(x)",
            {},
            "layer 'y' is a ReduceMean over no axes, which opset 17 does not have",
        ),
        (
            "a, b = Split<axis=1, num_outputs=2>(x) y = Concat<axis=1>(b, a)",
            {},
            "layer 'a' splits 3 into 2 uneven parts, which opset 17 needs the sizes for",
        ),
    ],
)
def test_what_opset_17_does_not_have_is_refused_by_the_name_of_the_layer(body, arrays, message, tmp_path):
    shape = (1, 3, 8, 8) if "Split" in body else IMAGE.shape
    model = ir.from_proto(TEXT["model"](body, x=shape, **arrays))

    with pytest.raises(Unsupported) as caught:
        opsets.convert(model, 17)

    assert str(caught.value) == message


NEWER = {
    "gelu": ("y = Gelu(x)", {}),
    "approximate gelu": ('h = Gelu<approximate="tanh">(x) y = Mul(h, x)', {}),
    "pooling": ("y = AveragePool<kernel_shape=[2,2], dilations=[1,1]>(x)", {}),
    "cast": ("c = Cast<to=6, saturate=1>(x) y = Cast<to=1>(c)", {}),
    "mean": ("y = ReduceMean<keepdims=0>(x, axes)", {"axes": np.array([2, 3])}),
}


@pytest.mark.parametrize("graph", NEWER)
@pytest.mark.parametrize(("start", "opset"), [(20, 18), (20, 17), (19, 18), (20, 19)])
def test_a_newer_graph_is_lowered_and_computes_the_same(start, opset, graph, tmp_path):
    if "gelu" in graph and start < 20:
        pytest.skip("Gelu came with opset 20")
    before, after = converted(tmp_path, *NEWER[graph], opset, start=start)

    onnx.checker.check_model(str(after), full_check=True)
    assert opsets.opset_of(ir.load(after)) == opset
    np.testing.assert_allclose(TEXT["run"](after, IMAGE), TEXT["run"](before, IMAGE), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "arrays", "message"),
    [
        (
            "y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x)",
            {},
            "layer 'y' is a AveragePool with dilations, which opset 18 does not have",
        ),
        (
            'y = Resize<mode="linear", coordinate_transformation_mode="half_pixel_symmetric">(x, , , sizes)',
            {"sizes": np.array([1, 4, 5, 11])},
            "layer 'y' is a Resize that opset 18 cannot express; the target needs opset 20",
        ),
        (
            'y = Pad<mode="wrap">(x, pads)',
            {"pads": np.array([0, 0, 1, 1, 0, 0, 2, 2])},
            "layer 'y' is a Pad that opset 18 cannot express; the target needs opset 20",
        ),
    ],
)
def test_what_opset_18_does_not_have_is_refused_by_the_name_of_the_layer(body, arrays, message):
    model = ir.from_proto(TEXT["model"](body, x=IMAGE.shape, opset=20, **arrays))

    with pytest.raises(Unsupported) as caught:
        opsets.convert(model, 18)

    assert str(caught.value) == message


def test_a_graph_above_opset_20_is_refused(tmp_path):
    with pytest.raises(Unsupported) as caught:
        converted(tmp_path, "y = Relu(x)", {}, 18, start=21)

    assert str(caught.value) == "the graph is opset 21 and the target takes 18; export it at 18"


@pytest.mark.parametrize("start", [11, 13, 17])
def test_older_graphs_are_raised_to_the_exporters_opset(start, tmp_path):
    body = "c = Conv<pads=[1,1,1,1]>(x, w) m = ReduceMean<axes=[2,3], keepdims=0>(c) y = Softmax<axis=1>(m)"
    path = TEXT["write"](tmp_path / "before.onnx", body, x=IMAGE.shape, opset=start, w=W(5, 4, 3, 3))
    model = ir.load(path)

    opsets.raise_to_exporter(model)

    ir.save(model, tmp_path / "after.onnx")
    onnx.checker.check_model(str(tmp_path / "after.onnx"), full_check=True)
    assert opsets.opset_of(model) == 18
    np.testing.assert_allclose(TEXT["run"](tmp_path / "after.onnx", IMAGE), TEXT["run"](path, IMAGE), rtol=1e-5)


def test_a_graph_that_cannot_be_raised_says_why():
    statistics = {name: np.ones((4, 8, 8), np.float32) for name in "sbmv"}
    model = TEXT["model"]("y = BatchNormalization<spatial=0>(x, s, b, m, v)", x=IMAGE.shape, opset=8, **statistics)

    with pytest.raises(
        Unsupported, match=r"the graph is opset 8 and cannot be raised to 18: .*spatial must have value 1"
    ):
        opsets.raise_to_exporter(ir.from_proto(model))
