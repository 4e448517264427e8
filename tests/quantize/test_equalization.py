"""Equalization changes nothing that a network computes: proven in float64 on every structure that it scales."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from rdeploy.quantize.channels import groups  # noqa: E402
from rdeploy.quantize.repair import equalization, extremes  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
OPS = ("Conv", "MatMul", "Add", "GlobalAveragePool")
AFFINE = QuantScheme(name="affine", activations="uint8", ops=OPS, output_ops=("Conv",))
SYMMETRIC = QuantScheme(name="symmetric", activations="int8", ops=OPS, residual="branch")

UNEVEN = np.geomspace(1, 0.01, 6).astype(np.float32)
"""How much smaller each channel is than the first."""

NETWORKS = {
    "plain": (
        "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v)",
        {"w": W(6, 3, 3, 3) * UNEVEN[:, None, None, None], "b": W(6, seed=1) * UNEVEN, "v": W(4, 6, 1, 1, seed=2)},
    ),
    "depthwise chain": (
        "a = Conv(x, w, b) r = Relu(a) d = Conv<group=6, pads=[1,1,1,1]>(r, k, c) s = Relu(d) y = Conv(s, v)",
        {
            "w": W(6, 3, 1, 1) * UNEVEN[:, None, None, None], "b": W(6, seed=1) * UNEVEN,
            "k": W(6, 1, 3, 3, seed=2), "c": W(6, seed=3) * UNEVEN[::-1], "v": W(4, 6, 1, 1, seed=4),
        },
    ),
    "residual": (
        "a = Conv(x, w) r = Relu(a) c = Conv(r, u) s = Add(r, c) t = Relu(s) p = GlobalAveragePool(t) y = Conv(p, v)",
        {
            "w": W(6, 3, 1, 1) * UNEVEN[:, None, None, None],
            "u": W(6, 6, 1, 1, seed=1) * UNEVEN[:, None, None, None], "v": W(4, 6, 1, 1, seed=2),
        },
    ),
    "grouped": (
        "a = Conv(x, w) r = Relu(a) y = Conv<group=2>(r, v)",
        {"w": W(6, 3, 1, 1) * UNEVEN[:, None, None, None], "v": W(4, 3, 1, 1, seed=2)},
    ),
    "pooling": (
        """a = Conv(x, w) r = LeakyRelu<alpha=0.1>(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
           p = AveragePool<kernel_shape=[2,2]>(m) u = Resize<mode="nearest">(p, , , twice) y = Conv(u, v)""",
        {
            "w": W(6, 3, 1, 1) * UNEVEN[:, None, None, None], "v": W(4, 6, 1, 1, seed=2),
            "twice": np.array([1, 6, 6, 6]),
        },
    ),
    "constant sum and joined rows": (
        "a = Conv(x, w) s = Add(a, k) c = Conv(x, u) j = Concat<axis=2>(s, c) y = Conv(j, v)",
        {
            "w": W(6, 3, 1, 1) * UNEVEN[:, None, None, None], "k": W(1, 6, 1, 1, seed=3) * UNEVEN[:, None, None],
            "u": W(6, 3, 1, 1, seed=1) * UNEVEN[:, None, None, None], "v": W(4, 6, 1, 1, seed=2),
        },
    ),
    "gate": (
        "a = Conv(x, w) p = GlobalAveragePool(x) q = Conv(p, g) s = Sigmoid(q) m = Mul(a, s) y = Conv(m, v)",
        {"w": W(6, 3, 1, 1) * UNEVEN[:, None, None, None], "g": W(6, 3, 1, 1, seed=1), "v": W(4, 6, 1, 1, seed=2)},
    ),
}  # fmt: skip

ATTENTION = """
    f = Reshape(x, tokens) n = LayerNormalization<axis=-1>(f, gamma, beta)
    q0 = MatMul(n, wq) q = Add(q0, bq) k0 = MatMul(n, wk) k = Add(bk, k0) v0 = MatMul(n, wv) v = Add(v0, bv)
    qh = Reshape(q, heads) kh = Reshape(k, heads) vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh) kt = Transpose<perm=[0,2,3,1]>(kh) vt = Transpose<perm=[0,2,1,3]>(vh)
    s = MatMul(qt, kt) p = Softmax(s) o = MatMul(p, vt) ot = Transpose<perm=[0,2,1,3]>(o) om = Reshape(ot, tokens)
    y0 = MatMul(om, wo) y = Add(y0, bo)
"""
ATTENTION_ARRAYS = {
    "tokens": np.array([1, 16, 12]), "heads": np.array([1, 16, 3, 4]),
    "gamma": np.geomspace(0.05, 5, 12).astype(np.float32), "beta": W(12, seed=1, scale=3),
    **{f"w{name}": W(12, 12, seed=i, scale=0.3) for i, name in enumerate("qkvo")},
    **{f"b{name}": W(12, seed=9 + i) for i, name in enumerate("qkvo")},
}  # fmt: skip


def double(body, **facts):
    """The same graph in float64."""
    proto = TEXT["model"](body, **facts)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float64), tensor.name))
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def outputs(model, image):
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return ReferenceEvaluator(proto).run(None, {"x": image.astype(np.float64)})[0]


def images(shape=(1, 3, 8, 8), count=6):
    return [W(*shape, seed=i) for i in range(count)]


def equalized(tmp_path, body, scheme=AFFINE, batches=None, **facts):
    """Watch the graph in float32, scale it in float64; return the float64 graphs before and after, and how many groups."""
    path = TEXT["write"](tmp_path / "fp32.onnx", body, **facts)
    seen = extremes.observe(path, batches or images(facts.get("x", (1, 3, 8, 8))))
    before = double(body, **facts)
    after = ir.from_proto(before)
    changed = equalization.apply(after, extremes.channels_of(seen), equalization.rules(after, [scheme]))
    return before, after, changed


def exactly(found, expected):
    return np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_computes_the_same(name, tmp_path):
    body, arrays = NETWORKS[name]

    before, after, changed = equalized(tmp_path, body, **arrays)

    assert changed
    for image in images(count=3):
        assert exactly(outputs(after, image), outputs(before, image))


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda s: s.name)
def test_attention_computes_the_same_with_its_layernorm_moved_and_its_values_scaled(scheme, tmp_path):
    shape = (1, 3, 8, 8)

    before, after, changed = equalized(tmp_path, ATTENTION, scheme, x=shape, **ATTENTION_ARRAYS)

    assert changed == 2  # what the LayerNormalization writes, and the values
    for image in images(shape, 3):
        assert exactly(outputs(after, image), outputs(before, image))


WINDOWS = """
    f = Reshape(x, grid) n = LayerNormalization<axis=-1>(f, gamma, beta) {between}
    w = Reshape(p, windows) t = Transpose<perm=[0,1,3,2,4,5]>(w) r = Reshape(t, tokens) m = MatMul(r, k) y = Add(m, b)
"""
ROLL = "a = Slice(n, two, end, one) c = Slice(n, zero, two, one) p = Concat<axis=1>(a, c)"
WINDOWS_ARRAYS = {
    **{name: np.array(value) for name, value in {"zero": [0], "one": [1], "two": [2], "end": [99], "halves": [2, 2]}.items()},
    "grid": np.array([1, 4, 4, 12]), "windows": np.array([1, 2, 2, 2, 2, 12]), "tokens": np.array([4, 4, 12]),
    "order": np.array([2, 3, 0, 1]), "none": np.zeros(8, np.int64), "pads": np.array([0, 1, 1, 0, 0, 1, 1, 0]),
    "gamma": np.geomspace(0.05, 5, 12).astype(np.float32), "beta": W(12, seed=1, scale=3), "k": W(12, 8), "b": W(8, seed=2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("between", "shifts"),
    [
        (ROLL, True),  # Swin's shifted windows
        ("a, c = Split<axis=1>(n, halves) p = Concat<axis=1>(c, a)", True),
        ("p = Gather<axis=2>(n, order)", True),
        ("p = Pad(n, none)", False),  # zeros stay zeros when they are scaled, not when they are shifted
        (f"{ROLL.replace('p =', 'd =')} q = Pad(d, pads) p = Slice(q, ones, ends, both)", False),
    ],
    ids=["roll", "split", "gather", "pad", "pad and cut"],
)  # fmt: skip
def test_a_layernorm_in_front_of_windows_gets_its_scale_and_its_shift(between, shifts, tmp_path):
    more = {"ones": np.array([1, 1]), "ends": np.array([5, 5]), "both": np.array([1, 2])}
    facts = {"x": (1, 3, 8, 8), **WINDOWS_ARRAYS, **more}

    before, after, changed = equalized(tmp_path, WINDOWS.format(between=between), **facts)

    assert changed == 1
    assert any(name.startswith("gamma::scaled") for name in after.graph.initializers)
    assert any(name.startswith("b::scaled") for name in after.graph.initializers) is shifts
    for image in images(count=3):
        assert exactly(outputs(after, image), outputs(before, image))


@pytest.mark.parametrize(
    "between",
    ["a, c = Split<axis=3>(n, sixes) p = Concat<axis=3>(c, a)", "p = Gather<axis=3>(n, backwards)", "p = Pad(n, pads, seven)"],
)  # fmt: skip
def test_channels_that_are_cut_or_mixed_or_padded_with_numbers_are_held_fast(between):
    more = {"sixes": np.array([6, 6]), "backwards": np.arange(12)[::-1].copy(), "seven": np.float32(7)}
    body = WINDOWS.format(between=between)
    if "Pad" in between:
        body = body.replace("w = Reshape(p, windows)", "q = Slice(p, zero, end, one) w = Reshape(q, windows)")
        more["pads"] = np.zeros(8, np.int64)

    assert groups(ir.from_proto(TEXT["model"](body, **{**WINDOWS_ARRAYS, **more})).graph) == []


def test_a_layernorms_channels_lie_around_0_and_are_of_one_size(tmp_path):
    facts = {"x": (1, 3, 8, 8), **ATTENTION_ARRAYS}
    before, after, _ = equalized(tmp_path, ATTENTION, **facts)

    spans = []
    for model in (before, ir.to_proto(after)):
        model.graph.output.append(onnx.helper.make_tensor_value_info("n", onnx.TensorProto.DOUBLE, None))
        rows = [ReferenceEvaluator(model).run(["n"], {"x": i.astype(np.float64)})[0].reshape(-1, 12) for i in images()]
        low, high = np.min(rows, axis=(0, 1)), np.max(rows, axis=(0, 1))
        spans.append((np.abs(low + high).max(), (high - low).max() / (high - low).min()))

    assert spans[1][0] < 0.5 * spans[0][0]
    assert spans[1][1] < 0.2 * spans[0][1]


def test_one_range_then_serves_every_channel(tmp_path):
    body, arrays = NETWORKS["depthwise chain"]

    _, after, _ = equalized(tmp_path, body, **arrays)

    proto = ir.to_proto(after)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.DOUBLE, None))
    peaks = np.max(
        [ReferenceEvaluator(proto).run(["r"], {"x": i.astype(np.float64)})[0] for i in images()], axis=(0, 1, 3, 4)
    )
    assert peaks.max() / peaks.min() < 4  # it was 100


RELU6 = "a = Conv(x, w) r = Clip(a, zero, six) y = Conv<group=3>(r, v)"
LIMITS = {"zero": np.float32(0), "six": np.float32(6)}


def test_a_channel_that_is_clipped_keeps_its_factor_and_the_others_stay_below_the_limit(tmp_path):
    w = np.zeros((3, 3, 1, 1), np.float32)
    w[0, 0], w[1, 1], w[2, 2] = 1.0, 0.1, 0.01
    batches = [np.full((1, 3, 8, 8), 8.0, np.float32)] * 2  # 8 is clipped, 0.8 and 0.08 are not

    before, after, changed = equalized(
        tmp_path, RELU6, x=(1, 3, 8, 8), batches=batches, w=w, v=np.ones((3, 1, 1, 1), np.float32), **LIMITS
    )

    assert changed == 1
    written = next(node for node in after.graph if node.op_type == "Conv").inputs[1].const_value.numpy()
    factors = written[[0, 1, 2], [0, 1, 2], 0, 0] / w[[0, 1, 2], [0, 1, 2], 0, 0]
    assert factors[0] == 1
    assert factors[1:] * [0.8, 0.08] == pytest.approx([3, 3])
    for value in (-3.0, 1.0, 5.0, 8.0, 16.0):  # up to twice what was seen
        image = np.full((1, 3, 8, 8), value)
        assert exactly(outputs(after, image), outputs(before, image))


def clipped(tmp_path, images):
    """Equalize a convolution, a ReLU6 and a depthwise convolution; return the factors of the channels."""
    w = np.diag([1.0, 0.1, 1.0]).astype(np.float32)[:, :, None, None]
    body = {"x": (1, 3, 4, 4), "w": w, "v": np.ones((3, 1, 1, 1), np.float32), **LIMITS}
    path = TEXT["write"](tmp_path / "fp32.onnx", RELU6, **body)
    assert equalization.equalize(path, tmp_path / "equalized.onnx", [AFFINE], images) == 1
    after = ir.load(tmp_path / "equalized.onnx").graph
    return next(node for node in after if node.op_type == "Conv").inputs[1].const_value.numpy()[
        range(3), range(3), 0, 0
    ] / (
        1.0,
        0.1,
        1.0,
    )


def test_factors_that_would_clip_images_they_were_not_found_on_are_smaller(tmp_path):
    known = np.stack([np.full((4, 4), value, np.float32) for value in (8.0, 5.0, -1.0)])[None]
    further = known * np.array([1.0, 2.5, 1.0], np.float32)[:, None, None]

    alike, unlike = clipped(tmp_path, [known] * 4), clipped(tmp_path, [known, further] * 2)

    assert alike[0] == unlike[0] == 1
    assert alike[1] == pytest.approx(6 / (2 * 0.5))
    assert unlike[1] == pytest.approx(6 / (4 * 1.25))  # twice what was seen would clip the other half


def test_a_channel_that_was_never_seen_keeps_its_factor_where_it_may_be_clipped(tmp_path):
    known = np.stack([np.full((4, 4), value, np.float32) for value in (8.0, 5.0, -1.0)])[None]

    assert clipped(tmp_path, [known] * 4)[2] == 1


@pytest.mark.parametrize(
    "between",
    ["r = Sigmoid(a)", "r = Clip(a, low, six)", "s = Sigmoid(a) r = Mul(a, s)", "r = HardSwish(a)", "r = Elu(a)"],
)
def test_what_does_not_pass_a_factor_on_holds_it_fast(between):
    arrays = {"w": W(6, 3, 1, 1), "v": W(4, 6, 1, 1)}
    limits = {"low": np.float32(-1), "six": np.float32(6)} if "low" in between else {}
    body = f"a = Conv(x, w) {between} y = Conv(r, v)"

    assert groups(ir.from_proto(TEXT["model"](body, **arrays, **limits)).graph) == []


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("y = Conv(x, w)", {"w": W(6, 3, 1, 1)}),  # the input and the output are not ours to scale
        ("a = Conv(x, w) b = Conv(a, v) y = Add(a, b)", {"w": W(6, 3, 1, 1), "v": W(6, 6, 1, 1)}),
        ("a = Conv(x, w) b = Conv(x, w) c = Add(a, b) y = Conv(c, v)", {"w": W(6, 3, 1, 1), "v": W(4, 6, 1, 1)}),
    ],
    ids=["alone", "residual into the output", "shared weights"],
)
def test_a_group_without_both_ends_is_left_alone(body, arrays):
    assert groups(ir.from_proto(TEXT["model"](body, **arrays)).graph) == []


def test_a_channel_that_is_always_0_is_not_blown_up(tmp_path):
    body, arrays = NETWORKS["plain"]
    arrays = {**arrays, "w": arrays["w"].copy(), "b": arrays["b"].copy()}
    arrays["w"][2], arrays["b"][2] = 0, -1

    before, after, _ = equalized(tmp_path, body, **arrays)

    weights = [node.inputs[1].const_value.numpy() for node in after.graph if node.op_type == "Conv"]
    assert all(np.isfinite(w).all() and np.abs(w).max() < 1e4 for w in weights)
    assert exactly(outputs(after, images()[0]), outputs(before, images()[0]))
