"""Gradients by ONNX Runtime: closed forms, and every rule against PyTorch's."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.quantize.adjoint.network import Network, backward  # noqa: E402
from rdeploy.quantize.ranges import session_of  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parents[2] / "onnx_text.py"))
W = TEXT["normal"]
I = np.int64  # noqa: E741
F = np.float32
MAP, ROWS = (1, 4, 8, 10), (1, 6, 4)


def generator():
    return np.random.default_rng(5)


def signs(*shape):
    """The first signs that a network draws."""
    return 2.0 * generator().integers(0, 2, shape) - 1.0


def felt(path, names, image):
    return next(Network(path, names, image).gradients(image, 1, generator()))


def agree(folder, body, x, constants, *, outputs=("y",), opset=20):
    """Assert that the gradient by x is PyTorch's."""
    torch_side = pytest.importorskip("rdeploy.quantize.differentiable", reason="PyTorch is not installed")
    path = TEXT["write"](folder / "m.onnx", body, x=x, opset=opset, check=False, outputs=outputs, **constants)
    image = W(*x, seed=4)
    exact = next(torch_side.Graph(ir.load(path).graph, {"x"}).gradients(image, 1, generator()))

    values, slopes = felt(path, {"x"}, image)["x"]

    assert np.array_equal(values, image)
    assert np.abs(exact["x"][1]).max() > 0
    np.testing.assert_allclose(slopes, exact["x"][1], rtol=2e-4, atol=2e-5)


def test_a_product_in_closed_form(tmp_path):
    """y = x w: the gradient of s . y by x is w s, that of what comes before is the same."""
    weight = W(4, 3)
    path = TEXT["write"](tmp_path / "m.onnx", "r = Identity(x) y = MatMul(r, w)", x=(1, 4), w=weight)
    found = felt(path, {"x", "r"}, W(1, 4))

    for name in ("x", "r"):
        np.testing.assert_allclose(found[name][1], signs(1, 3) @ weight.T, rtol=1e-6)


def test_what_is_read_twice_is_felt_twice(tmp_path):
    """y = x + 3 x."""
    path = TEXT["write"](tmp_path / "m.onnx", "a = Mul(x, three) y = Add(x, a)", x=(1, 4), three=np.float32([3]))
    found = felt(path, {"x", "a"}, W(1, 4))

    np.testing.assert_allclose(found["x"][1], 4 * signs(1, 4))
    np.testing.assert_allclose(found["a"][1], signs(1, 4))


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = Conv<pads=[1,1,1,1]>(x, w, b)", {"w": W(6, 4, 3, 3), "b": W(6)}),
        ("y = Conv<pads=[1,0,2,1], strides=[2,2]>(x, w)", {"w": W(6, 4, 3, 3)}),
        ("y = Conv<pads=[2,2,2,2], dilations=[2,2], group=2>(x, w)", {"w": W(6, 2, 3, 3)}),
        ("y = Conv<pads=[2,2,2,2], strides=[2,3], group=4>(x, w)", {"w": W(8, 1, 5, 5)}),
        ("y = Conv<pads=[3,3,3,3]>(x, w)", {"w": W(2, 4, 3, 3)}),
        ('y = Conv<auto_pad="SAME_UPPER", strides=[2,2], kernel_shape=[3,3]>(x, w)', {"w": W(6, 4, 3, 3)}),
        ('y = Conv<auto_pad="SAME_LOWER", strides=[2,2], kernel_shape=[3,3]>(x, w)', {"w": W(6, 4, 3, 3)}),
        ("y = ConvTranspose<pads=[1,1,1,1], strides=[2,2], output_padding=[1,0], group=2>(x, w)", {"w": W(4, 3, 3, 3)}),
        ("y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x)", {}),
        ("y = AveragePool<kernel_shape=[3,2], pads=[1,0,1,1], count_include_pad=1>(x)", {}),
        ("y = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x)", {}),
        ("y = MaxPool<kernel_shape=[3,3], pads=[0,1,1,0], strides=[2,3], ceil_mode=1>(x)", {}),
        ("y = GlobalMaxPool(x)", {}),
        ("a = GlobalAveragePool(x) y = Flatten(a)", {}),
    ],
)
def test_windows(body, constants, tmp_path):
    agree(tmp_path, body, MAP, constants)


@pytest.mark.parametrize(
    ("body", "weight", "x"),
    [
        ("y = Conv<pads=[1,1,1,1]>(x, w)", W(6, 4, 3, 3), MAP),
        ("y = Conv(x, w)", W(6, 4, 1, 1), MAP),
        ("y = Conv<strides=[2,2]>(x, w)", W(6, 4, 1, 1), MAP),
        ("y = Conv<pads=[1,0,2,1], strides=[2,3], dilations=[1,2]>(x, w)", W(6, 4, 3, 2), MAP),
        ("y = Conv<pads=[2,2,2,2], dilations=[2,2], group=2>(x, w)", W(6, 2, 3, 3), MAP),
        ("y = Conv<pads=[1,1,1,1], strides=[2,2], group=4>(x, w)", W(8, 1, 3, 3), MAP),
        ("y = ConvTranspose<pads=[1,1,1,1], strides=[2,2], output_padding=[1,0], group=2>(x, w)", W(4, 3, 3, 3), MAP),
        ("y = MatMul(x, w)", W(4, 5), ROWS),
        ("y = MatMul(x, w)", W(1, 4, 5), ROWS),
        ("y = Gemm<alpha=0.5, transB=1>(x, w)", W(5, 4), ROWS[1:]),
    ],
)
def test_gradients_by_weights(body, weight, x, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from rdeploy.quantize.operators.evaluation import evaluate

    path = TEXT["write"](tmp_path / "m.onnx", body, x=x, w=weight)
    image, (node,) = W(*x, seed=4), ir.load(path).graph
    leaf = torch.from_numpy(weight).requires_grad_()
    exact = evaluate(node, [torch.from_numpy(image), leaf])[0]
    drawn = signs(*exact.shape).astype(F)

    model = ir.load(path)
    back = backward(model.graph, {"w"}, {})
    found = back.gradients[model.graph.initializers["w"]]
    found.dtype = ir.DataType.FLOAT
    model.graph.outputs[:] = [found]
    slopes = session_of(model).run(None, {"x": image, next(iter(back.seeds)): drawn})[0]

    np.testing.assert_allclose(
        slopes, torch.autograd.grad((exact * torch.from_numpy(drawn)).sum(), leaf)[0], rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("place", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scale", [[1.0, 1.0, 2.0, 1.5], [1.0, 1.0, 0.6, 0.7]])
def test_resizing_to_a_scale(mode, place, scale, tmp_path):
    body = f'y = Resize<mode="{mode}", coordinate_transformation_mode="{place}">(x, , s)'
    agree(tmp_path, body, MAP, {"s": np.float32(scale)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resizing_some_axes_to_a_size(mode, tmp_path):
    agree(tmp_path, f'y = Resize<mode="{mode}", axes=[2,3]>(x, , , s)', MAP, {"s": np.array([9, 15], I)})


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resizing_with_antialiasing(mode, tmp_path):
    """What is linear: x . gradient = signs . y."""
    body = f'y = Resize<mode="{mode}", antialias=1>(x, , , s)'
    path = TEXT["write"](tmp_path / "m.onnx", body, x=MAP, check=False, s=np.array([1, 4, 5, 6], I))

    values, slopes = felt(path, {"x"}, W(*MAP))["x"]

    assert (values * slopes).sum() == pytest.approx((signs(1, 4, 5, 6) * TEXT["run"](path, W(*MAP))).sum(), rel=1e-4)


@pytest.mark.parametrize(
    "body",
    [
        *(
            f"y = {name}(x)"
            for name in ("Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Erf", "Gelu", "Softplus", "Abs", "Neg", "Exp",
                         "Elu", "LeakyRelu", "Identity", "ReduceL2", "ReduceSumSquare", "ReduceMean<keepdims=0>", "ReduceMax",
                         "ReduceMin", "ReduceSum", "Softmax<axis=1>", "LogSoftmax", "Softmax",
                         'Gelu<approximate="tanh">', "HardSigmoid<alpha=0.3, beta=0.4>", "Elu<alpha=0.7>",
                         "LeakyRelu<alpha=0.3>", "SpaceToDepth<blocksize=2>", "DepthToSpace<blocksize=2>")
        ),
        "y = Clip(x, low, high)", "y = Clip(x, , high)", "y = PRelu(x, slope)", "y = Pow(x, two)",
        "a = Abs(x) y = Pow(a, third)", "a = Exp(x) b = Log(a) y = Sqrt(a) ", "a = Exp(x) y = Reciprocal(a)",
        "y = Sub(half, x)", "y = Div(x, half)", "a = Exp(x) y = Div(half, a)", "y = Mul(x, x)", "a = Mul(x, half) y = Mul(a, x)",
        "a = Neg(x) y = Max(x, a)", "a = Mul(x, half) y = Min(x, a)", "a = Neg(x) y = Sum(x, a, x)", "y = Mean(x, half)",
        "a = Greater(x, half) b = Neg(x) y = Where(a, x, b)", "a = ReduceMean(x) y = Sub(x, a)",
        "a, b = Split<axis=1, num_outputs=2>(x) y = Mul(a, b)", "a, b = Split<axis=1, num_outputs=2>(x) y = Relu(b)",
        "a = Relu(x) y = Concat<axis=1>(x, a, x)", "y = Transpose<perm=[0,2,3,1]>(x)",
        "y = Pad(x, pads, half)", "y = Slice(x, starts, ends, axes, steps)", "y = Gather<axis=2>(x, rows)",
        "y = Gather<axis=3>(x, row)", "y = BatchNormalization(x, scale, scale, scale, scale)",
        "y = InstanceNormalization(x, scale, scale)", "y = GroupNormalization<num_groups=2>(x, halves, halves)",
        "a = Cast<to=1>(x) y = Mul(a, x)", "a = Floor(x) y = Mul(a, x)", "a = Squeeze(x, first) y = Unsqueeze(a, first)",
        'y = Einsum<equation="nchw,cd->nhwd">(x, w)',
        'a = Neg(x) y = Einsum<equation="nchw,nchv->nhwv">(x, a)',
    ],
)  # fmt: skip
def test_operators_on_a_map(body, tmp_path):
    constants = {
        "low": F(-0.5), "high": F(0.7), "slope": F([0.2]), "two": F(2), "third": F(1.5), "half": F(0.5),
        "first": np.array([0], I), "pads": np.array([0, 1, 2, 0, 0, 0, 1, -1], I), "starts": np.array([1, 0], I),
        "ends": np.array([-1, 9], I),
        "axes": np.array([2, 3], I), "steps": np.array([2, 3], I), "rows": np.array([0, 3, 3, 1], I), "row": np.array(2, I),
        "scale": F([0.5, 1.0, 1.5, 2.0]), "w": W(4, 3), "halves": F([0.5, 2.0, 1.0, 3.0]),
    }  # fmt: skip
    agree(tmp_path, body, MAP, constants, opset=21 if "GroupNorm" in body else 20)


@pytest.mark.parametrize(
    "body",
    [
        "y = LayerNormalization(x, scale, bias)",
        "y = LayerNormalization<axis=1>(x, scale)",
        "q = MatMul(x, w) k = MatMul(x, u) t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, x)",
        "a = Unsqueeze(x, first) y = MatMul(a, many)",
        "a = Squeeze(x, first) y = Gemm<alpha=0.5, beta=2.0>(a, w, row)",
        "a = Squeeze(x, first) y = Gemm<transA=1, transB=1>(a, u6, bias6)",
        "a = Squeeze(x, first) b = Mul(a, a) y = Gemm<transB=1>(a, b)",
        "a = Squeeze(x, first) y = Gemm<transA=1>(a, a)",
        "y = Expand(x, wide)",
        "a = Reshape(x, flat) y = Mul(a, a)",
    ],
)
def test_operators_on_tokens(body, tmp_path):
    constants = {
        "scale": F([0.5, 1.0, 1.5, 2.0]), "bias": F([1, 2, 3, 4]), "w": W(4, 4), "u": W(4, 4, seed=1), "first": np.array([0], I),
        "many": W(3, 4, 5), "row": W(4), "u6": W(5, 6), "bias6": W(5), "wide": np.array([2, 6, 4], I),
        "flat": np.array([1, -1], I),
    }  # fmt: skip
    agree(tmp_path, body, ROWS, constants)


def test_several_outputs_count_by_their_own_size(tmp_path):
    body = "y = Mul(x, hundred) z = Relu(x)"
    agree(tmp_path, body, ROWS, {"hundred": F([100])}, outputs=("y", "z"))


def test_what_is_not_finite_at_an_output_is_left_out(tmp_path):
    """y is x where x > 0 and -inf elsewhere, z = 2 x: what y feels is over the size of what is finite in it."""
    body = "b = Greater(x, zero) y = Where(b, x, lost) z = Mul(x, two)"
    facts = {"zero": F(0), "lost": F(-np.inf), "two": F([2])}
    path = TEXT["write"](tmp_path / "m.onnx", body, x=(1, 3), outputs=("y", "z"), **facts)
    drawn = signs(2, 3)

    _, slopes = felt(path, {"x"}, F([[3, -1, 4]]))["x"]

    expected = drawn[:1] * F([[1, 0, 1]]) / 5 + 2 * drawn[1:] / np.sqrt(4 * 26)
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)


def test_shapes_that_the_graph_does_not_tell(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) y = Concat<axis=1>(x, r)", x=(1, 3), check=False)
    image = F([[1, -2, 3]])

    values, slopes = felt(path, {"x"}, image)["x"]

    np.testing.assert_allclose(slopes, signs(1, 6)[:, :3] + signs(1, 6)[:, 3:] * (values > 0))


@pytest.mark.parametrize(
    ("body", "constants", "why"),
    [
        ("r = Relu(x) y = Mish(r)", {}, "layer 'y' (Mish) has no gradient in rdeploy: no rule for Mish"),
        (
            'y = Pad<mode="reflect">(x, pads)',
            {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], I)},
            "layer 'y' (Pad) has no gradient in rdeploy: Pad by reflect",
        ),
        (
            "w = Conv(x, k) y = Conv(x, w)",
            {"k": W(4, 4, 1, 1)},
            "layer 'y' (Conv) has no gradient in rdeploy: 'w' is computed",
        ),
        ("i = Floor(x) y = Neg(i)", {}, "the network's output has no gradient: it is the same whatever the values"),
    ],
)
def test_what_has_no_rule_names_the_layer(body, constants, why, tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", body, x=(4, 4, 8, 8), **constants)

    with pytest.raises(Unsupported) as caught:
        Network(path, {"x"}, W(4, 4, 8, 8))

    assert str(caught.value) == why


def test_an_older_opset_is_said(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "y = Relu(x)", opset=13)

    with pytest.raises(Unsupported, match="gradients begin at opset 16, the graph has 13"):
        Network(path, {"x"}, W(1, 3, 8, 8))


def test_what_onnx_runtime_refuses_is_a_reason(tmp_path, monkeypatch):
    """Ranges can be found without gradients: nothing that it raises may stop a build."""
    path = TEXT["write"](tmp_path / "m.onnx", "y = Relu(x)")

    def refuse(model):
        raise RuntimeError("no kernel\nin many lines")

    monkeypatch.setattr("rdeploy.quantize.ranges.session_of", refuse)

    with pytest.raises(Unsupported) as caught:
        Network(path, {"x"}, W(1, 3, 8, 8))

    assert str(caught.value) == "ONNX Runtime takes no gradients of it: no kernel"


def test_pytorch_is_not_imported(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) y = Conv(r, w)", x=MAP, w=W(3, 4, 1, 1))
    code = (
        "import sys, numpy as np; from pathlib import Path; from rdeploy.quantize import gradients, ranges; "
        f"p = Path({str(path)!r}); images = [np.ones({MAP}, np.float32)] * 4; "
        "found = gradients.observe(p, ranges.observe(p, ['r'], images), images); "
        "assert found['r'].felt and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
