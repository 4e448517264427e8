"""Lowering folds a zero point into biases: the same integers as with it, and nothing changes in float."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.backends import tensorrt_rtx  # noqa: E402
from rdeploy.quantize import check, lowering, qdq  # noqa: E402
from rdeploy.quantize.channels import SMOOTHED  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.quantize.ranges import Lowered  # noqa: E402
from rdeploy.types import QuantScheme, Target  # noqa: E402

HERE = Path(__file__).parent
TEXT, EXACT = runpy.run_path(str(HERE.parent / "onnx_text.py")), runpy.run_path(str(HERE / "test_equalization.py"))
W, run = TEXT["normal"], TEXT["run"]
SIGNED = QuantScheme(name="symmetric", activations="int8", ops=("Conv", "MatMul", "Gemm", "Add"), residual="branch")
AFFINE = dataclasses.replace(SIGNED, name="affine", activations="uint8")

FACTS = {"w": W(6, 3, 3, 3), "b": W(6), "zero": np.float32(0), "six": np.float32(1.5)}
NETWORKS = {
    "relu": ("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v, c)", {"v": W(4, 6, 1, 1), "c": W(4)}),
    "relu6": ("a = Conv(x, w, b) r = Clip(a, zero, six) y = Conv(r, v)", {"v": W(4, 6, 1, 1)}),
    "grouped": ("a = Conv(x, w, b) r = Relu(a) y = Conv<group=2>(r, v)", {"v": W(8, 3, 3, 3)}),
    "two readers": (
        "a = Conv(x, w, b) r = Relu(a) d = Conv(r, v) e = Conv(r, u) y = Add(d, e)",
        {"v": W(4, 6, 1, 1), "u": W(4, 6, 1, 1, seed=1)},
    ),
    "gemm": (
        "p = GlobalAveragePool(x) f = Flatten(p) a = Gemm(f, k, b) r = Relu(a) y = Gemm<transB=1>(r, v, c)",
        {"k": W(3, 6), "v": W(4, 6), "c": W(4)},
    ),
    "no bend": ("r = Conv(x, w, b) y = Conv(r, v, c)", {"v": W(4, 6, 1, 1), "c": W(4)}),
    "layernorm": (
        "f = Reshape(x, shape) r = LayerNormalization<axis=-1>(f, gamma) m = MatMul(r, k) y = Add(m, c)",
        {"shape": np.array([16, 12]), "gamma": W(12), "k": W(12, 4), "c": W(4)},
    ),
    "smoothed": (
        "f = Reshape(x, shape) e = Erf(f) g = Add(e, t) r = Mul(g, u) m = MatMul(r, k) y = Add(m, c)",
        {"shape": np.array([16, 12]), "t": W(12), "u": W(12), "k": W(12, 4), "c": W(4)},
    ),
    "linear": (
        "f = Reshape(x, shape) l = MatMul(f, k) a = Add(l, b) r = Relu(a) m = MatMul(r, v) y = Add(m, c)",
        {"shape": np.array([16, 12]), "k": W(12, 6), "v": W(6, 4), "c": W(4)},
    ),
}  # fmt: skip


SPAN = {"no bend": (-1.0, 2.0), "layernorm": (-1.0, 2.0), "smoothed": (-1.0, 2.0)}
"""What the tensor that is lowered may hold; a ReLU's begins at 0."""


def model(name):
    body, arrays = NETWORKS[name]
    used = {key: value for key, value in (FACTS | arrays).items() if f"{key})" in body or f"{key}," in body}
    return body, used


def wide(key, array):
    """Return weights of 32 channels, which integer kernels are there for."""
    if key in ("zero", "six"):
        return array
    if key == "shape":
        return np.array([256, 32])
    sides = {"w": (32, 32, 3, 3), "v": (32, 32, 1, 1), "k": (32, 32)}.get(key, (32,))
    return W(*sides)


def named(graph):
    """Give the Mul of smoothing its name, by which it is known."""
    for node in graph.graph:
        if node.op_type == "Mul":
            node.name += SMOOTHED
    return graph


def image(seed=5):
    return W(1, 3, 8, 8, seed=seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_network_computes_the_same(name):
    body, arrays = model(name)
    before = EXACT["double"](body, x=(1, 3, 8, 8), **arrays)
    after = named(ir.from_proto(before))
    low, high = SPAN.get(name, (0.0, 2.0))
    placement = place(after, SIGNED)

    assert lowering.names(placement, SIGNED) == {"r"}
    spans = dict.fromkeys(placement.reads, (-4.0, 4.0)) | {"r": Lowered(low, high)}
    found = lowering.lower(after.graph, placement, spans, SIGNED, {})

    step = (high - low) / 255
    assert found["r"] == pytest.approx((-127 * step, 127 * step))
    assert all(found[name] == (-4.0, 4.0) for name in found if name != "r")
    for seed in range(3):
        assert EXACT["exactly"](EXACT["outputs"](after, image(seed)), EXACT["outputs"](before, image(seed)))


@pytest.mark.parametrize("name", NETWORKS)
def test_signed_integers_hold_what_unsigned_ones_with_a_zero_point_do(name, tmp_path):
    """The ReLU's range is cut at both ends of what the image gives: clipping is the same as well."""
    body, arrays = model(name)
    found = {}
    for scheme in (SIGNED, AFFINE):
        graph = named(ir.from_proto(TEXT["model"](body, **arrays)))
        low, high = SPAN.get(name, (0.0, 1.2))
        placement = place(graph, scheme)
        around = (-4.0 * (127 / 128 if scheme is SIGNED else 1), 4.0 * 127 / 128)  # the same steps
        spans = dict.fromkeys(placement.reads, around) | {"r": Lowered(low, high) if scheme is SIGNED else (low, high)}
        weights = qdq.quantize_weights(graph.graph, placement, scheme, {})
        spans = lowering.lower(graph.graph, placement, spans, scheme, weights)
        qdq.insert(graph, placement, spans, scheme, weights)
        found[scheme.name] = tmp_path / f"{scheme.name}.onnx"
        ir.save(graph, found[scheme.name])
    check.check_legal(found["symmetric"], SIGNED)

    signed, unsigned = (run(found[name], image()) for name in ("symmetric", "affine"))

    assert np.abs(signed - unsigned).max() < 1e-4 * np.abs(unsigned).max()


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, v)",
        "a = Conv(x, w, b) r = Relu(a) d = Conv(r, v) g = GlobalAveragePool(r) y = Add(d, g)",
        "a = Conv(x, w, b) r = LeakyRelu(a) y = Conv(r, v)",
        "a = Conv(x, w, b) s = Add(a, a) r = Relu(s) y = Conv(r, v)",
        "a = Conv(x, w, b) r = Relu(a) d = Conv(r, v) y = Mul(d, a)",
        "r = Relu(x) y = Conv(r, u)",
    ],
    ids=["padded", "pooled as well", "no floor", "a sum", "read before the ReLU", "no layer in front"],
)
def test_what_could_not_be_given_back_keeps_a_range_around_0(body):
    graph = ir.from_proto(TEXT["model"](body, w=W(6, 3, 1, 1), b=W(6), v=W(6, 6, 1, 1), u=W(6, 3, 1, 1)))

    assert lowering.names(place(graph, SIGNED), SIGNED) == frozenset()


@pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))
@pytest.mark.parametrize("name", ["relu", "relu6", "layernorm"])
def test_tensorrt_builds_the_same_kernels(name, tmp_path):
    """Moved limits are still part of the convolution's kernel."""
    body, arrays = model(name)
    arrays = {key: wide(key, array) for key, array in arrays.items()}
    kernels = []
    for moves in (True, False):
        graph = ir.from_proto(TEXT["model"](body, x=(1, 32, 16, 16), **arrays))
        placement = place(graph, SIGNED)
        weights = qdq.quantize_weights(graph.graph, placement, SIGNED, {})
        spans = dict.fromkeys(placement.reads, (-4.0, 4.0)) | (
            {"r": Lowered(*SPAN.get(name, (0.0, 1.2)))} if moves else {}
        )
        spans = lowering.lower(graph.graph, placement, spans, SIGNED, weights)
        qdq.insert(graph, placement, spans, SIGNED, weights)
        path = tmp_path / f"{moves}.onnx"
        ir.save(graph, path)
        target = Target(name="mine", compute_capabilities=("sm_89",))
        engine = tensorrt_rtx.build_engine(path, tmp_path / str(moves), target=target, options=tensorrt_rtx.Options())
        kernels.append(engine.executed_precision)

    assert kernels[0] == kernels[1]


def test_unsigned_integers_need_none():
    body, arrays = model("relu")

    assert lowering.names(place(ir.from_proto(TEXT["model"](body, **arrays)), AFFINE), AFFINE) == frozenset()


def test_a_moved_tensor_has_a_name_of_its_own():
    """What is compared by name with the FP32 graph must not be taken for an error."""
    body, arrays = model("relu6")
    graph = ir.from_proto(TEXT["model"](body, **arrays))
    placement = place(graph, SIGNED)
    lowering.lower(graph.graph, placement, {"x": (-1.0, 1.0), "r": Lowered(0.0, 1.5)}, SIGNED, {})

    names = {value.name for node in graph.graph for value in node.outputs}
    assert {"a", "r"}.isdisjoint(names)
    assert {"a::lowered", "r::lowered"} <= names
