"""The evaluator in PyTorch: the same values as ONNX Runtime (its gradients: `adjoint/test_network.py`)."""

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

CASES = {
    "convolutions": (
        """a = Conv<pads=[1,0,0,1], strides=[2,1], dilations=[1,2]>(x, w, b) h = HardSwish(a) g = Conv<group=2>(h, u)
           y = ConvTranspose<strides=[2,2], pads=[1,1,0,1], output_padding=[1,0]>(g, v)""",
        {"w": W(4, 3, 3, 3), "b": W(4), "u": W(6, 2, 1, 1), "v": W(6, 2, 3, 3)},
    ),
    "pooling": (
        """a = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)
           b = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
           c = AveragePool<kernel_shape=[2,2], strides=[2,2], count_include_pad=1>(b) d = Add(a, c) e = GlobalAveragePool(d)
           f = GlobalMaxPool(d) g = Concat<axis=1>(e, f) y = Flatten(g)""",
        {},
    ),
    "normalisation": (
        """n = LayerNormalization<axis=-1, epsilon=0.001>(x, g, h) i = InstanceNormalization(n, s, t)
           j = GroupNormalization<num_groups=1>(i, o, o) k = BatchNormalization(j, s, t, t, q) y = LogSoftmax<axis=2>(k)""",
        {"g": W(8), "h": W(8), "s": W(3), "t": W(3), "o": np.ones(1, np.float32), "q": np.full(3, 0.5, np.float32)},
    ),
    "attention": (
        """r = Reshape(x, shape) t = Transpose<perm=[0,2,1]>(r) q = MatMul(t, a) k = Gemm<transB=1, alpha=0.5>(flat, a, c)
           l, m = Split<axis=2>(q, parts) n = Unsqueeze(k, zero) o = Slice(n, zero, eight, one) p = Mul(l, half) s = Sub(p, m)
           e = Einsum<equation="bij,bkj->bik">(s, m) z = Softmax<axis=-1>(e) f = MatMul(z, m) y = Erf(f)""",
        {"shape": np.array([0, 3, -1], I), "a": W(3, 4), "flat": W(5, 4), "c": W(3), "parts": np.array([2, 2], I),
         "zero": np.array([0], I), "eight": np.array([8], I), "one": np.array([1], I), "half": np.float32(0.5)},
    ),
    "activations": (
        """a = Clip(x, lo, hi) b = LeakyRelu<alpha=0.2>(a) c = PRelu(b, p) d = HardSigmoid<alpha=0.3, beta=0.4>(c) e = Elu(c)
           f = Softplus(e) g = Gelu<approximate="tanh">(f) h = Mul(d, g) i = Sigmoid(h) j = Tanh(x) k = Max(i, j)
           l = Where(m, k, j) y = Mish(l)""",
        {"lo": np.float32(-1), "hi": np.float32(1.5), "p": W(3, 1, 1), "m": W(1, 3, 8, 8) > 0},
    ),
    "shapes": (
        """a = Pad<mode="reflect">(x, pads) b = Pad(a, ones, value, axis) h = Shape(b) g = Gather(h, last) c = Squeeze(b, none)
           e = Expand(c, wide) d = ReduceMean<keepdims=0>(e, axis) f = ReduceL2<keepdims=1>(d, last) y = Div(d, f)""",
        {"pads": np.array([0, 0, 1, 2, 0, 0, 2, 1], I), "ones": np.array([1, 1], I), "axis": np.array([2], I),
         "value": np.float32(0.5), "last": np.array([1], I), "none": np.array([0], I), "wide": np.array([2, 3, 1, 1], I)},
    ),
    "resizing": (
        """a = Resize<mode="linear">(x, , s) b = Conv(a, w) c = DepthToSpace<blocksize=2>(b)
           d = DepthToSpace<blocksize=2, mode="CRD">(b)
           e = Sub(c, d) y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(e, , s)""",
        {"s": np.array([1, 1, 2, 2], np.float32), "w": W(8, 3, 1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_operator_gives_what_onnx_runtime_gives(name, tmp_path):
    body, constants = CASES[name]
    path = TEXT["write"](tmp_path / "m.onnx", body, opset=20, check=False, **constants)
    image = W(1, 3, 8, 8, seed=4)

    graph = differentiable.Graph(ir.load(path).graph, {"y"})
    found = next(graph.gradients(image, 1, np.random.default_rng(0)))["y"][0]

    np.testing.assert_allclose(found, TEXT["run"](path, image), rtol=1e-4, atol=1e-5)


def test_an_operator_without_a_gradient_is_named(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "a = Round(x) y = Det(a)")

    with pytest.raises(Unsupported) as caught:
        differentiable.Graph(ir.load(path).graph, {"y"})

    assert str(caught.value) == "rdeploy has no gradient of Det, Round"
