"""Queries scaled against keys: the products stay the same, proven in float64 on every way in which layers write them."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from rdeploy.quantize.repair import attention, equalization  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SHAPE = (1, 16, 12)
UNEVEN = np.geomspace(1, 0.02, 12).astype(np.float32)
MIX = "s = MatMul(qt, kt) p = Softmax(s) o = MatMul(p, vt) ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, tokens)"
FUSED = f"m = MatMul(x, w) a = Add(m, b) r = Reshape(a, parts) t = Transpose<perm=[2,0,3,1,4]>(r) {{cut}} {MIX}"
TURNED = "kt = Transpose<perm=[0,1,3,2]>(k)"
ARRAYS = {
    "tokens": np.array(SHAPE), "heads": np.array([1, 16, 3, 4]), "parts": np.array([1, 16, 3, 3, 4]), "half": np.float32(0.5),
    **{name: np.array([value]) for name, value in {"zero": 0, "one": 1, "two": 2, "three": 3}.items()},
    **{name: np.array(value) for name, value in {"first": 0, "second": 1, "third": 2}.items()},
    "wq": W(12, 12, seed=1) * UNEVEN, "bq": W(12, seed=2) * UNEVEN, "wk": W(12, 12, seed=3) * UNEVEN[::-1], "bk": W(12, seed=4),
    "windows": np.array([4, 4, 3, 4]), "single": np.array([1, 16, 1, 4]), "wn": W(12, 4), "wv": W(12, 12, seed=5),
    "w": W(12, 36) * np.concatenate([UNEVEN, UNEVEN[::-1], np.ones(12, np.float32)]), "b": W(36, seed=9),
}  # fmt: skip
NETWORKS = {
    "a layer each": f"""
        q0 = MatMul(x, wq) q1 = Add(bq, q0) qh = Reshape(q1, heads) q2 = Transpose<perm=[0,2,1,3]>(qh) qt = Mul(q2, half)
        k0 = MatMul(x, wk) k1 = Add(k0, bk) kh = Reshape(k1, heads) k2 = Transpose<perm=[0,2,3,1]>(kh) kt = Mul(half, k2)
        v0 = MatMul(x, wv) vh = Reshape(v0, heads) vt = Transpose<perm=[0,2,1,3]>(vh) {MIX}""",
    "slices": FUSED.format(
        cut="q0 = Slice(t, zero, one, zero) qt = Squeeze(q0, zero) k0 = Slice(t, one, two, zero) k = Squeeze(k0, zero) "
        f"v0 = Slice(t, two, three) vt = Squeeze(v0, zero) {TURNED}"
    ),
    "a split": FUSED.format(
        cut=f"q0, k0, v0 = Split<num_outputs=3>(t) qt = Squeeze(q0, zero) k = Squeeze(k0, zero) vt = Squeeze(v0, zero) {TURNED}"
    ),
    "picked": FUSED.format(cut=f"qt = Gather(t, first) k = Gather(t, second) vt = Gather(t, third) {TURNED}"),
    "windows": """
        q0 = MatMul(x, wq) q1 = Reshape(q0, windows) qt = Transpose<perm=[0,2,1,3]>(q1)
        k0 = MatMul(x, wk) k1 = Reshape(k0, windows) kt = Transpose<perm=[0,2,3,1]>(k1) y = MatMul(qt, kt)""",
}


def used(body):
    return {name: array for name, array in ARRAYS.items() if name in re.findall(r"\w+", body)}


def double(path):
    """The graph at a path in float64."""
    proto = onnx.load(path)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float64), tensor.name))
    return proto


def output(proto, image):
    return ReferenceEvaluator(proto).run(None, {"x": image.astype(np.float64)})[0]


def images(count=4):
    return [W(*SHAPE, seed=i) for i in range(count)]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_products_stay_the_same_and_their_noise_falls(name, tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", NETWORKS[name], x=SHAPE, **used(NETWORKS[name]))
    before = double(path)
    after = ir.from_proto(before)
    (product,) = attention.products(ir.load(path).graph)

    assert attention.scale(after, path, images()) == 1

    scaled = ir.to_proto(after)
    for image in images(2):
        expected = output(before, image)
        assert np.abs(output(scaled, image) - expected).max() <= 1e-12 * np.abs(expected).max()
    assert noise(scaled, product.names) < 0.5 * noise(before, product.names)


def noise(proto, names):
    """What a range for all channels, of queries and of keys, makes of noise in the products."""
    graph = onnx.ModelProto.FromString(proto.SerializeToString())
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in names)
    _, queries, keys = ReferenceEvaluator(graph).run(None, {"x": images(1)[0].astype(np.float64)})
    return np.abs(queries).max() ** 2 * np.square(keys).sum() + np.abs(keys).max() ** 2 * np.square(queries).sum()


@pytest.mark.parametrize(
    "body",
    [
        NETWORKS["a layer each"] + "z = Relu(k1)",  # keys are read by something else
        NETWORKS["picked"].replace("(t, second)", "(t, first)"),  # queries are keys as well
        "q = MatMul(x, wq) k0 = MatMul(x, wk) kt = Transpose<perm=[0,2,1]>(k0) n = Relu(q) y = MatMul(n, kt)",
        "xt = Transpose<perm=[0,2,1]>(x) q = MatMul(x, wq) y = MatMul(q, xt)",  # no layer writes the keys
        # one head of keys for all heads of queries
        "q0 = MatMul(x, wq) qh = Reshape(q0, heads) qt = Transpose<perm=[0,2,1,3]>(qh) k0 = MatMul(x, wn) "
        "k1 = Reshape(k0, single) kt = Transpose<perm=[0,2,3,1]>(k1) y = MatMul(qt, kt)",
        # tokens where channels should be
        "q = MatMul(x, wq) k0 = MatMul(x, wk) qt = Transpose<perm=[0,2,1]>(q) y = MatMul(qt, k0)",
    ],
)
def test_what_would_change_something_else_is_left_as_it_is(body, tmp_path):
    outputs = ("y", "z") if "z =" in body else ("y",)
    path = TEXT["write"](tmp_path / "fp32.onnx", body, x=SHAPE, outputs=outputs, **used(body))

    assert attention.products(ir.load(path).graph) == []


@pytest.mark.parametrize("asked", [True, False])
def test_equalization_does_it_where_attention_is_quantized(asked, tmp_path):
    body = NETWORKS["a layer each"]
    path = TEXT["write"](tmp_path / "fp32.onnx", body, x=SHAPE, **used(body))
    scheme = QuantScheme(name="both", activations="uint8", ops=("MatMul",), products="scores" if asked else "none")

    changed = equalization.equalize(path, tmp_path / "equalized.onnx", [scheme], images())

    assert changed == asked
