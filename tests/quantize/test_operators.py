"""Operators in PyTorch against ONNX Runtime, those whose attributes two tools read differently above all."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")
pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.quantize import differentiable  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
I = np.int64  # noqa: E741
CONV, UP = {"w": W(4, 3, 3, 3)}, {"w": W(3, 2, 3, 3)}
MAP, LINE = (1, 3, 7, 10), (1, 3, 11)


def evaluated(path, image):
    """Return what PyTorch makes of the output `y`."""
    graph = differentiable.Graph(ir.load(path).graph, {"y"})
    return next(graph.gradients(image, 1, np.random.default_rng(0)))["y"][0]


def same(folder, body, x, constants):
    """Assert that PyTorch computes what ONNX Runtime does."""
    path = TEXT["write"](folder / "m.onnx", body, x=x, opset=20, check=False, **constants)
    image = W(*x, seed=4)
    found, expected = evaluated(path, image), TEXT["run"](path, image)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("pads", ["[0,0,0,0]", "[1,1,1,1]", "[0,1,1,0]"])
@pytest.mark.parametrize("window", ["kernel_shape=[2,2], strides=[2,2]", "kernel_shape=[3,3], strides=[2,3]"])
def test_average_pooling_that_rounds_up(window, pads, include, tmp_path):
    attributes = f"{window}, pads={pads}, ceil_mode=1, count_include_pad={include}"
    same(tmp_path, f"y = AveragePool<{attributes}>(x)", MAP, {})


@pytest.mark.parametrize("pads", ["[0,0,0,0]", "[1,1,1,1]", "[0,1,1,0]"])
@pytest.mark.parametrize("more", ["", ", dilations=[2,1]"])
def test_max_pooling_that_rounds_up(pads, more, tmp_path):
    same(tmp_path, f"y = MaxPool<kernel_shape=[3,3], strides=[2,3], pads={pads}, ceil_mode=1{more}>(x)", MAP, {})


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(
    ("operator", "constants"),
    [
        ("MaxPool<kernel_shape=[2,3], strides=[2,2], auto_pad={}>(x)", {}),
        ("AveragePool<kernel_shape=[2,3], strides=[2,2], auto_pad={}>(x)", {}),
        ("AveragePool<kernel_shape=[2,3], strides=[2,2], auto_pad={}, count_include_pad=1>(x)", {}),
        ("Conv<kernel_shape=[3,3], strides=[2,2], auto_pad={}>(x, w)", CONV),
        ("ConvTranspose<kernel_shape=[3,3], strides=[2,2], auto_pad={}>(x, w)", UP),
    ],
)
def test_pads_that_follow_from_the_size(operator, constants, auto, tmp_path):
    same(tmp_path, "y = " + operator.format(f'"{auto}"'), MAP, constants)


@pytest.mark.parametrize("sizes", ["[15,20]", "[13,21]"])
def test_a_transposed_convolution_of_a_given_size(sizes, tmp_path):
    same(tmp_path, f"y = ConvTranspose<strides=[2,2], output_shape={sizes}>(x, w)", MAP, UP)


@pytest.mark.parametrize(
    "body",
    [
        "a = MaxPool<kernel_shape=[3], strides=[2], ceil_mode=1>(x) y = AveragePool<kernel_shape=[2], dilations=[2]>(a)",
        "y = AveragePool<kernel_shape=[4], strides=[3], ceil_mode=1>(x)",
    ],
)
def test_pooling_over_one_axis(body, tmp_path):
    same(tmp_path, body, LINE, {})


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap", "constant"])
@pytest.mark.parametrize("pads", [[0, 0, 1, 2, 0, 0, 3, 1], [0, 1, 2, 0, 0, 0, -1, 2]])
def test_every_kind_of_padding(mode, pads, tmp_path):
    same(tmp_path, f'y = Pad<mode="{mode}">(x, pads)', MAP, {"pads": np.array(pads, I)})


@pytest.mark.parametrize(
    "body",
    [
        "b = Cast<to=9>(r) c = Cast<to=1>(b) y = Add(c, x)",
        "p = Relu(x) b = Cast<to=2>(p) c = Cast<to=1>(b) y = Add(c, x)",
        "b = Cast<to=3>(x) c = Cast<to=1>(b) y = Add(c, x)",
        "b = Cast<to=11>(x) y = CastLike(b, x)",
        "y = Min(x)",
        "y = Max(x, r, s)",
        "y = Sum(x, r, s)",
        "y = Mean(x, r, s)",
        "a = Ceil(x) b = GreaterOrEqual(x, r) c = LessOrEqual(x, s) d = And(b, c) y = Where(d, x, a)",
        "a = ReduceL1<keepdims=1>(x) b = ReduceSumSquare(x) c = Softsign(a) d = Selu(c) e = Sign(x) f = Mul(d, e) y = Add(f, b)",
        "a = Slice(x, zero, six, two) b = Slice(a, zero, six, three) y = SpaceToDepth<blocksize=2>(b)",
    ],
)
def test_casts_and_operators_of_any_number_of_inputs(body, tmp_path):
    whole = {"zero": np.array([0], I), "six": np.array([6], I), "two": np.array([2], I), "three": np.array([3], I)}
    same(tmp_path, f"r = Mul(x, half) s = Neg(x) {body}", MAP, {"half": np.float32(0.5), **whole})


@pytest.mark.parametrize("place", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scale", [[1.0, 1.0, 2.0, 1.5], [1.0, 1.0, 0.6, 0.7]])
def test_resizing_to_a_scale(mode, place, scale, tmp_path):
    body = f'y = Resize<mode="{mode}", coordinate_transformation_mode="{place}">(x, , s)'
    same(tmp_path, body, MAP, {"s": np.float32(scale)})


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_the_nearest_pixel_is_found_as_asked(rounding, tmp_path):
    body = f'y = Resize<mode="nearest", nearest_mode="{rounding}">(x, , , s)'
    same(tmp_path, body, MAP, {"s": np.array([1, 3, 14, 15], I)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resizing_some_axes(mode, tmp_path):
    same(tmp_path, f'y = Resize<mode="{mode}", axes=[2,3]>(x, , , s)', MAP, {"s": np.array([9, 15], I)})


def test_a_cubic_resize_that_leaves_out_what_is_outside(tmp_path):
    body = 'y = Resize<mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1>(x, , , s)'
    same(tmp_path, body, MAP, {"s": np.array([1, 3, 9, 15], I)})


def test_a_use_that_is_not_known_names_the_layer(tmp_path):
    body = 'y = Resize<coordinate_transformation_mode="half_pixel", keep_aspect_ratio_policy="not_larger", axes=[2,3]>(x, , , s)'
    path = TEXT["write"](tmp_path / "m.onnx", body, check=False, s=np.array([9, 9], I))

    with pytest.raises(Unsupported) as caught:
        evaluated(path, W(1, 3, 8, 8))

    assert str(caught.value) == "layer 'y' (Resize) has no gradient in rdeploy: sizes that keep the aspect ratio"


def test_a_second_output_that_is_read_is_not_known(tmp_path):
    body = "p, i = MaxPool<kernel_shape=[2,2]>(x) c = Cast<to=1>(i) y = Add(p, c)"
    path = TEXT["write"](tmp_path / "m.onnx", body, check=False)

    with pytest.raises(Unsupported) as caught:
        evaluated(path, W(1, 3, 8, 8))

    assert str(caught.value) == "layer 'p' (MaxPool) has no gradient in rdeploy: what it writes beside its first output"


def test_shapes_and_ranges_that_no_tool_folded(tmp_path):
    body = "o = ConstantOfShape<value: tensor = int64[1] {3}>(n) r = Range(a, b, c) e = Expand(r, o) y = Add(x, e)"
    constants = {"n": I([2]), "a": np.float32(0), "b": np.float32(3), "c": np.float32(1)}
    same(tmp_path, body, (3, 3), constants)
