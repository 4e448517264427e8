"""Closed forms of how much a channel matters: sums of squared weights, to mean 1."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize.importance import channel_axes, channel_weights  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]


def weights(body, **facts):
    return channel_weights(ir.from_proto(TEXT["model"](body, **facts)).graph)


def axes(body, **facts):
    return channel_axes(ir.from_proto(TEXT["model"](body, **facts)).graph)


def to_mean_1(values):
    return np.asarray(values, np.float64) / np.mean(values)


def squared(array):
    return np.square(array.astype(np.float64))


def test_a_channel_of_a_convolution_matters_by_its_squared_taps():
    w = W(4, 3, 3, 3)

    found = weights("y = Conv(x, w)", w=w)

    assert set(found) == {"x"}
    np.testing.assert_allclose(found["x"], to_mean_1(squared(w).sum(axis=(0, 2, 3))))


def test_a_channel_of_a_depthwise_convolution_matters_by_its_own_filter():
    w = W(3, 1, 3, 3)

    found = weights("y = Conv<group=3>(x, w)", w=w)

    np.testing.assert_allclose(found["x"], to_mean_1(squared(w).sum(axis=(1, 2, 3))))


def test_the_channels_of_a_group_reach_that_groups_outputs_only():
    w = np.zeros((4, 2, 1, 1), np.float32)
    w[:2, 0], w[:2, 1], w[2:, 0], w[2:, 1] = 1, 2, 3, 4

    found = weights("y = Conv<group=2>(x, w)", x=(1, 4, 2, 2), w=w)

    np.testing.assert_allclose(found["x"], to_mean_1([1, 4, 9, 16]))


@pytest.mark.parametrize(
    ("body", "shape", "outputs"),
    [
        ("y = Gemm<transB=1>(x, w)", (5, 8), 0),
        ("y = Gemm(x, w)", (8, 5), 1),
        ("y = MatMul(x, w)", (8, 5), 1),
    ],
)
def test_an_input_of_a_linear_layer_matters_by_its_squared_column(body, shape, outputs):
    w = W(*shape)

    found = weights(body, x=(1, 8), w=w)

    np.testing.assert_allclose(found["x"], to_mean_1(squared(w).sum(axis=outputs)))


def test_what_matters_is_carried_through_two_layers_and_what_lies_between():
    w, v = W(4, 3, 3, 3, seed=1), W(2, 4, seed=2)
    body = "c = Conv(x, w) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB=1>(f, v)"

    found = weights(body, w=w, v=v)

    inner = to_mean_1(squared(v).sum(axis=0))
    for name in ("f", "p", "r", "c"):
        np.testing.assert_allclose(found[name], inner)
    np.testing.assert_allclose(found["x"], to_mean_1((squared(w).sum(axis=(2, 3)) * inner[:, None]).sum(axis=0)))


def test_both_paths_of_a_residual_add_up():
    w, v = W(3, 3, 1, 1, seed=1), W(2, 3, 1, 1, seed=2)

    found = weights("r = Relu(x) c = Conv(r, w) s = Add(c, r) y = Conv(s, v)", w=w, v=v)

    after = squared(v).sum(axis=(0, 2, 3))
    through = (squared(w)[:, :, 0, 0] * after[:, None]).sum(axis=0)
    np.testing.assert_allclose(found["s"], to_mean_1(after))
    np.testing.assert_allclose(found["r"], to_mean_1(after + through))


def test_a_tensor_that_two_layers_read_matters_to_both():
    w, v = W(4, 3, 1, 1, seed=1), W(2, 3, 1, 1, seed=2)

    found = weights("a = Conv(x, w) y = Conv(x, v)", outputs=("a", "y"), w=w, v=v)

    np.testing.assert_allclose(found["x"], to_mean_1(squared(w).sum(axis=(0, 2, 3)) + squared(v).sum(axis=(0, 2, 3))))


def test_nothing_is_known_before_an_operator_that_is_not():
    found = weights("t = Softmax<axis=1>(x) y = Conv(t, w)", w=W(4, 3, 1, 1))

    assert set(found) == {"t"}


def test_weights_of_zero_say_nothing():
    assert weights("y = Conv(x, w)", w=np.zeros((4, 3, 1, 1), np.float32)) == {}


def test_channels_are_where_the_reader_has_them():
    body = """
        c = Conv<kernel_shape=[2,2], strides=[2,2]>(x, w) t = Transpose<perm=[0,2,3,1]>(c)
        n = LayerNormalization<axis=-1>(t, g) m = MatMul(n, v) y = Sigmoid(m)
    """

    found = axes(body, w=W(6, 3, 2, 2), g=W(6), v=W(6, 5))

    assert (found["x"], found["t"], found["n"]) == (1, 3, 3)
    assert axes("y = MatMul(x, w)", x=(1, 7, 8), w=W(8, 5))["x"] == 2


CONVNEXT = "h = MatMul(x, w) s = Mul(h, g) t = Transpose<perm=[0,3,1,2]>(s) y = Conv(t, v)"
CONVNEXT_ARRAYS = {"w": W(3, 8), "g": W(8), "v": W(2, 8, 1, 1)}


def test_what_a_linear_layer_writes_has_its_channels_last_also_after_a_layer_scale():
    found = axes(CONVNEXT, x=(1, 5, 5, 3), **CONVNEXT_ARRAYS)

    assert (found["h"], found["s"], found["t"]) == (3, 3, 1)


def test_a_linear_layer_whose_readers_say_nothing_passes_its_weights_on():
    w = CONVNEXT_ARRAYS["w"]

    found = weights(CONVNEXT, x=(1, 5, 5, 3), **CONVNEXT_ARRAYS)

    assert found["x"] == pytest.approx(to_mean_1(squared(w).sum(axis=1)))
