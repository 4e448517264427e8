"""Centering changes nothing that a network computes, and lets every channel lie around 0: proven in float64."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from rdeploy.quantize.channels import groups  # noqa: E402
from rdeploy.quantize.repair import centering  # noqa: E402

HERE = Path(__file__).parent
TEXT, EXACT = runpy.run_path(str(HERE.parent / "onnx_text.py")), runpy.run_path(str(HERE / "test_equalization.py"))
W, double, outputs, exactly, images = (
    TEXT["normal"],
    *(EXACT[name] for name in ("double", "outputs", "exactly", "images")),
)

NETWORKS = {
    "bottleneck": ("a = Conv(x, w) r = Conv(a, v, c) y = Relu(r)", {"w": W(6, 3, 1, 1), "v": W(4, 6, 1, 1), "c": W(4)}),
    "grouped reader": ("a = Conv(x, w, b) y = Conv<group=2>(a, v)", {"w": W(6, 3, 3, 3), "b": W(6), "v": W(8, 3, 3, 3)}),
    "residual stream": (
        """a = Conv(x, w, b) e = Conv(a, u) r = Relu(e) d = Conv(r, k) s = Add(a, d) f = Conv(s, i) g = Relu(f)
           h = Conv(g, j) t = Add(s, h) y = Conv(t, v)""",
        {"w": W(6, 3, 1, 1), "b": W(6, scale=5), "u": W(9, 6, 1, 1), "k": W(6, 9, 1, 1), "v": W(4, 6, 1, 1),
            "i": W(9, 6, 1, 1, seed=1), "j": W(6, 9, 1, 1, seed=1)},
    ),
    "pooled": (
        """a = Conv(x, w, b) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a) p = AveragePool<kernel_shape=[2,2]>(m)
           g = GlobalAveragePool(p) f = Flatten(g) q = MatMul(f, v) y = Add(q, c)""",
        {"w": W(6, 3, 1, 1), "b": W(6), "v": W(6, 4), "c": W(4)},
    ),
    "layernorm": (
        "f = Reshape(x, shape) n = LayerNormalization<axis=-1>(f, gamma, beta) m = MatMul(n, w) y = Add(m, b)",
        {"shape": np.array([16, 12]), "gamma": W(12), "beta": W(12, seed=1), "w": W(12, 5), "b": W(5)},
    ),
    "linear": (
        "f = Reshape(x, shape) l = MatMul(f, u) n = Add(l, c) m = MatMul(n, w) y = Add(m, b)",
        {"shape": np.array([16, 12]), "u": W(12, 7), "c": W(7, scale=4), "w": W(7, 5), "b": W(5)},
    ),
}  # fmt: skip


def moved(body, **arrays):
    """Center every group of a graph by the middle of each channel on one image; return before, after and how many were."""
    before = double(body, x=(1, 3, 8, 8), **arrays)
    after = ir.from_proto(before)
    count = 0
    for group in groups(after.graph):
        middles = {name: _middle(before, name, axes) for name, axes in group.tensors.items()}
        if (by := centering.find(after.graph, group, middles)) is not None:
            centering.apply(after.graph, group, by)
            count += 1
    return before, after, count


def _middle(proto, name, axes):
    array = values(proto, name)
    others = tuple(i for i in range(array.ndim) if i not in axes)
    return (array.min(others).reshape(-1) + array.max(others).reshape(-1)) / 2


def values(proto, name):
    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.graph.output[0].name = name
    return ReferenceEvaluator(copy).run([name], {"x": images()[0].astype(np.float64)})[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same(name):
    body, arrays = NETWORKS[name]

    before, after, count = moved(body, **arrays)

    assert count
    for image in images(count=3):
        assert exactly(outputs(after, image), outputs(before, image))


def test_every_channel_of_a_residual_stream_lies_closer_around_0():
    before, after, _ = moved(NETWORKS["residual stream"][0], **NETWORKS["residual stream"][1])

    for name in ("a", "s", "t"):
        was, now = (np.abs(_middle(m, name, (1,))).max() for m in (before, ir.to_proto(after)))
        assert now < was / 2


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("a = Conv(x, w, b) y = Conv<pads=[1,1,1,1]>(a, v)", {"v": W(4, 6, 3, 3)}),
        ('a = Conv(x, w, b) y = Conv<auto_pad="SAME_UPPER">(a, v)', {"v": W(4, 6, 3, 3)}),
        ("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)", {"v": W(4, 6, 1, 1)}),
        ("a = Conv(x, w, b) r = Pad(a, pads) y = Conv(r, v)", {"v": W(4, 6, 1, 1), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
        ("a = Conv(x, w, b) r = Mul(a, two) y = Conv(r, v)", {"v": W(4, 6, 1, 1), "two": np.float32(2)}),
        (
            "a = Conv(x, w, b) d = Conv(x, w) j = Concat<axis=3>(a, d) y = Conv(j, v)",
            {"v": W(4, 6, 1, 1)},
        ),
    ],
    ids=["padded", "padded by itself", "bent", "zeros put in", "scaled", "parts of two layers"],
)  # fmt: skip
def test_what_could_not_be_given_back_is_left_alone(body, arrays):
    _, _, count = moved(body, w=W(6, 3, 1, 1), b=W(6), **arrays)

    assert count == 0


def test_the_values_of_attention_are_left_where_they_are():
    body = """f = Reshape(x, shape) q = MatMul(f, u) p = Softmax<axis=-1>(q) l = MatMul(f, v) n = Add(l, c) t = MatMul(p, n)
              m = MatMul(t, w) y = Add(m, b)"""
    arrays = {"shape": np.array([12, 16]), "u": W(16, 12), "v": W(16, 7), "c": W(7, scale=4), "w": W(7, 5), "b": W(5)}

    _, _, count = moved(body, **arrays)

    assert count == 0
