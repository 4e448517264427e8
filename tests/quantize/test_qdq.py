"""The Q/DQ pairs that are written: their numbers, their places, and what three parsers say of them."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from rdeploy.backends import tensorrt_rtx  # noqa: E402
from rdeploy.quantize import qdq  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.types import QuantScheme, Target  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "GlobalAveragePool", "Concat")
AFFINE = QuantScheme(name="affine", activations="uint8", ops=OPS)
SYMMETRIC = QuantScheme(name="symmetric", activations="int8", ops=OPS, residual="branch")

BODY = """
    s = Conv<pads=[1,1,1,1]>(x, stem, b) a = Relu(s)
    d = Conv<pads=[1,1,1,1], group=8>(a, depthwise) h = HardSwish(d)
    c = Conv(h, point, b) sum = Add(c, a) r = Relu(sum)
    p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB=1>(f, classifier, offset)
"""
ARRAYS = {
    "stem": W(8, 3, 3, 3, seed=1, scale=0.2),
    "depthwise": W(8, 1, 3, 3, seed=2, scale=0.4),
    "point": W(8, 8, 1, 1, seed=3, scale=0.4),
    "classifier": W(5, 8, seed=4),
    "b": W(8, seed=5, scale=0.1),
    "offset": W(5, seed=6),
}
IMAGE = np.random.default_rng(9).uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)


def graph(body=BODY, arrays=ARRAYS, **facts):
    return ir.from_proto(TEXT["model"](body, **facts, **arrays))


def quantized(model, folder, scheme, **how):
    """Quantize a graph with the exact ranges of IMAGE (or those given); return (the file, the FP32 file)."""
    ir.save(model, folder / "fp32.onnx")
    placement = place(model, scheme)
    names = sorted(placement.reads)
    image = how.pop("image", IMAGE)
    ranges = how.pop("ranges", None) or measured(folder / "fp32.onnx", names, image)
    if scheme.activations == "int8":
        ranges = {name: (-max(-low, high), max(-low, high)) for name, (low, high) in ranges.items()}
    qdq.insert(model, placement, ranges, scheme, **how)
    ir.save(model, folder / "int8.onnx")
    return folder / "int8.onnx", folder / "fp32.onnx"


def measured(path, names, image):
    model = onnx.load(str(path))
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(v for v in model.graph.value_info if v.name in names and v.name not in known)
    onnx.save(model, str(path.with_name("watched.onnx")))
    found = {"x": image}
    for name in names:
        if name != "x":
            found[name] = TEXT["run"](path.with_name("watched.onnx"), image, name)
    return {name: (min(0.0, float(found[name].min())), max(0.0, float(found[name].max()))) for name in names}


def constants(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def sqnr_db(exact, rounded):
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum())


@pytest.mark.parametrize("span", [(-1.0, 1.0), (-0.5, 1.0), (0.0, 3.0), (-3.0, 0.0), (-1e-6, 2e3), (0.0, 1e-4)])
def test_an_affine_scale_spans_the_range_in_255_steps_with_zero_exact(span):
    low, high = span

    scale, zero_point = qdq.scale_and_zero_point(span, "uint8")

    assert scale.dtype == np.float32
    assert zero_point.dtype == np.uint8
    assert scale == pytest.approx((high - low) / 255, rel=1e-6)
    ends = (-int(zero_point) * float(scale), (255 - int(zero_point)) * float(scale))
    assert ends == pytest.approx(span, abs=0.501 * float(scale))


@pytest.mark.parametrize(("low", "zero_point"), [(0.0, 0), (-1.0, 255)])
def test_a_one_sided_range_has_its_zero_point_at_an_end(low, zero_point):
    assert qdq.scale_and_zero_point((low, low + 1.0), "uint8")[1] == zero_point


@pytest.mark.parametrize("span", [(-2.0, 2.0), (-0.5, 2.0), (-2.0, 0.5), (0.0, 2.0)])
def test_a_symmetric_scale_covers_the_larger_side_in_127_steps(span):
    scale, zero_point = qdq.scale_and_zero_point(span, "int8")

    assert scale == pytest.approx(2.0 / 127, rel=1e-6)
    assert zero_point == 0
    assert zero_point.dtype == np.int8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("activations", "span"), [("uint8", (-0.5, 1.5)), ("uint8", (0.0, 2.0)), ("int8", (-1.0, 1.0))]
)
def test_activations_of_few_bits_have_that_many_values_and_no_more(bits, activations, span, tmp_path):
    """A Clip in front of the 8-bit pair holds them: the ends of the grid are the ends of the range."""
    scheme = QuantScheme(name="narrow", activations=activations, ops=("Conv",), activation_bits=bits)
    path = TEXT["write"](tmp_path / "a.onnx", "y = Conv(x, w)", x=(1, 1, 40, 40), w=np.ones((1, 1, 1, 1), np.float32))
    image = np.linspace(-3, 3, 1600, dtype=np.float32).reshape(1, 1, 40, 40)

    model = ir.load(path)
    qdq.insert(model, place(model, scheme), {"x": span}, scheme)
    ir.save(model, tmp_path / "b.onnx")
    values = np.unique(TEXT["run"](tmp_path / "b.onnx", image))

    step = (span[1] - span[0]) / (2**bits - 1) if activations == "uint8" else span[1] / (2 ** (bits - 1) - 1)
    assert len(values) == 2**bits
    assert np.diff(values) == pytest.approx(step, rel=1e-4)
    assert values[-1] == pytest.approx(span[1], abs=0.501 * step)
    assert 0.0 in values


@pytest.mark.parametrize("activations", ["int8", "uint8"])
@pytest.mark.parametrize("span", [(0.0, 0.0), (0.0, 1e-30), (-1e-40, 0.0)])
def test_a_tiny_range_gets_a_scale_that_a_float32_can_divide_by(span, activations):
    scale, zero_point = qdq.scale_and_zero_point(span, activations)

    assert scale == pytest.approx(1e-25, rel=1e-6)
    assert zero_point == 0


def test_a_weight_that_fills_its_grid_is_exact():
    grid = np.array([[-127, -64, 0, 1, 127], [-127, 127, 30, 31, 32]], np.float32)
    steps = np.array([[0.5], [0.0125]], np.float32)

    values, scales = qdq.quantize_weight(grid * steps, 0, 127)

    np.testing.assert_array_equal(values, grid)
    np.testing.assert_allclose(scales, steps[:, 0], rtol=1e-6)
    assert values.dtype == np.int8
    assert scales.dtype == np.float32


def test_a_channel_is_scaled_by_itself_along_its_axis():
    weight = np.array([[1.0, 100.0], [-0.5, 25.0], [0.25, -50.0]], np.float32)

    values, scales = qdq.quantize_weight(weight, 1, 127)

    assert scales.shape == (2,)
    assert (np.abs(values * scales - weight).max(axis=0) <= 0.51 * scales).all()
    assert 90 < scales[1] / scales[0] < 110


def test_a_channel_of_zeros_stays_zero():
    weight = np.zeros((2, 3, 1, 1), np.float32)
    weight[1] = 0.5

    values, scales = qdq.quantize_weight(weight, 0, 127)

    assert not values[0].any()
    assert scales[0] > 0
    assert np.isfinite(scales).all()


def test_weights_of_seven_bits_stay_within_63():
    values, scales = qdq.quantize_weight(W(4, 100), 0, 63)

    assert np.abs(values).max() == 63
    assert np.abs(values * scales[:, None] - W(4, 100)).max() < 0.1


def test_clipping_a_channel_never_costs_squared_error():
    weight = W(2, 100_000)  # its largest values lie beyond the 3.92 sigma that 8 bits want
    plain_scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    plain = np.square(np.rint(weight / plain_scale) * plain_scale - weight).sum(axis=1)

    values, scales = qdq.quantize_weight(weight, 0, 127)

    error = np.square(values * scales[:, None] - weight).sum(axis=1)
    assert (error <= plain * (1 + 1e-5)).all()
    assert (error < 0.97 * plain).any()


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda s: s.name)
def test_the_graph_is_valid_and_runs_close_to_float(scheme, tmp_path):
    path, exact = quantized(graph(), tmp_path, scheme)

    onnx.checker.check_model(str(path), full_check=True)
    assert sqnr_db(TEXT["run"](exact, IMAGE), TEXT["run"](path, IMAGE)) > 25


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda s: s.name)
def test_weights_are_int8_symmetric_and_per_channel_and_biases_stay_float(scheme, tmp_path):
    path, _ = quantized(graph(), tmp_path, scheme)

    found = constants(path)
    for name in ("stem", "depthwise", "point", "classifier"):
        assert found[f"{name}_int8"].dtype == np.int8
        assert found[f"{name}_int8"].shape == ARRAYS[name].shape
        assert found[f"{name}_scale"].shape == (len(ARRAYS[name]),)
        assert f"{name}_zero_point" not in found  # symmetric: it is 0
        assert name not in found
    np.testing.assert_array_equal(found["b"], ARRAYS["b"])
    np.testing.assert_array_equal(found["offset"], ARRAYS["offset"])
    activation = np.uint8 if scheme is AFFINE else np.int8
    zero_points = [v for n, v in found.items() if n.endswith("_zero_point") and v.ndim == 0]
    assert zero_points
    assert {zero.dtype.type for zero in zero_points} == {activation}


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("y = Gemm<transB=1>(x, w)", (5, 8), 0),
        ("y = Gemm(x, w)", (8, 5), 1),
        ("y = MatMul(x, w)", (8, 5), 1),
        ("i = Reshape(x, shape) o = ConvTranspose(i, w) y = Flatten(o)", (4, 3, 2, 1), 1),
    ],
)
def test_the_scales_lie_along_the_outputs_of_every_kind_of_layer(body, shape, axis, tmp_path):
    weight = W(*shape) * np.geomspace(1, 300, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    arrays = {"w": weight.astype(np.float32), **({"shape": np.array([1, 4, 1, 2])} if "shape" in body else {})}
    image = W(1, 8)

    path, exact = quantized(graph(body, arrays, x=(1, 8)), tmp_path, AFFINE, image=image)

    node = next(n for n in onnx.load(str(path)).graph.node if n.input[0] == "w_int8")
    assert [a.i for a in node.attribute if a.name == "axis"] == [axis]
    assert constants(path)["w_scale"].shape == (shape[axis],)
    onnx.checker.check_model(str(path), full_check=True)
    assert sqnr_db(TEXT["run"](exact, image), TEXT["run"](path, image)) > 30


def test_all_readers_of_a_tensor_share_one_pair(tmp_path):
    path, _ = quantized(graph(), tmp_path, AFFINE)

    nodes = onnx.load(str(path)).graph.node
    readers = [n.name for n in nodes if "a_dequantized" in n.input]
    assert sorted(readers) == ["d", "sum"]
    assert sum(n.op_type == "QuantizeLinear" for n in nodes) == 7  # x a h c r p f


def test_weights_that_two_layers_share_are_written_once(tmp_path):
    arrays = {"w": W(3, 3, 1, 1)}
    path, exact = quantized(graph("a = Conv(x, w) r = Relu(a) y = Conv(r, w)", arrays), tmp_path, AFFINE)

    assert sum(n.op_type == "DequantizeLinear" and n.input[0] == "w_int8" for n in onnx.load(str(path)).graph.node) == 1
    assert sqnr_db(TEXT["run"](exact, IMAGE), TEXT["run"](path, IMAGE)) > 25


def test_weights_that_something_else_reads_stay_for_it(tmp_path):
    body = "h = MatMul(x, w) n = ReduceSum(w) y = Mul(h, n)"
    path, _ = quantized(graph(body, {"w": W(8, 5)}, x=(1, 8)), tmp_path, AFFINE, image=W(1, 8))

    assert {"w", "w_int8"} <= set(constants(path))


def test_names_that_the_graph_already_has_are_left_alone(tmp_path):
    body = "x_quantized = Mul(x, x_scale) c = Conv(x, w) y = Add(c, x_quantized)"
    arrays = {"x_scale": np.float32(3), "w": W(3, 3, 1, 1)}
    scheme = dataclasses.replace(AFFINE, residual="none")

    path, exact = quantized(graph(body, arrays), tmp_path, scheme)

    assert sqnr_db(TEXT["run"](exact, IMAGE), TEXT["run"](path, IMAGE)) > 25


def test_quantized_weights_are_kept_between_calls():
    known = {}
    first, second = graph(), graph()
    one = qdq.quantize_weights(first.graph, place(first, AFFINE), AFFINE, known)
    two = qdq.quantize_weights(second.graph, place(second, SYMMETRIC), SYMMETRIC, known)

    assert set(one) == {"stem", "depthwise", "point", "classifier"}
    assert all(two[name][0] is one[name][0] for name in one)
    small = dataclasses.replace(AFFINE, weight_max=63)
    assert np.abs(qdq.quantize_weights(first.graph, place(first, small), small, known)["stem"][0]).max() == 63


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda s: s.name)
@pytest.mark.parametrize("largest_weight", [0.0, 1e-9, 1e-6])
def test_the_bias_of_a_dead_channel_fits_32_bits(scheme, largest_weight, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'rdeploy[cpu]'")
    weight, classifier = W(8, 3, 3, 3, seed=1, scale=0.2), W(5, 8, seed=4)
    for array in (weight, classifier):
        array[2] *= largest_weight / np.abs(array[2]).max()
    arrays = {"stem": weight, "b": W(8, seed=5) + 80, "classifier": classifier, "offset": W(5, seed=6) + 80}
    model = graph(
        "c = Conv<pads=[1,1,1,1]>(x, stem, b) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB=1>(f, classifier, offset)",
        arrays,
    )
    scheme = dataclasses.replace(scheme, weight_max=63)  # no CPU's kernels saturate on these
    written, exact = quantized(model, tmp_path, scheme)
    values, initializers = onnx.load(written), constants(written)
    for node in values.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            bias, scales = initializers[node.input[2]], initializers[node.input[1].replace("_dequantized", "_scale")]
            step = initializers[node.input[0].replace("_dequantized", "_scale")]
            assert np.all(np.abs(bias) / (np.float64(step) * scales) < 2**31)
    session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])  # with its integer kernels
    (found,) = session.run(None, {"x": IMAGE})
    assert found[0, 2] == pytest.approx(TEXT["run"](exact, IMAGE)[0, 2], rel=0.01)


@pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))
def test_tensorrt_rtx_builds_the_symmetric_graph_and_keeps_its_weights_in_int8(tmp_path):
    path, _ = quantized(graph(), tmp_path, SYMMETRIC)

    engine = tensorrt_rtx.build_engine(
        path,
        tmp_path / "engine",
        target=Target(name="t", compute_capabilities=("sm_89",)),
        options=tensorrt_rtx.Options(),
    )

    assert dict(engine.executed_precision).get("int8", 0) >= 3


@pytest.mark.parametrize(
    ("weight_max", "bits", "words"),
    [
        (127, 8, None),
        (63, 8, None),
        (7, 8, "weights of 4 bits, activations of 8"),
        (127, 4, "weights of 8 bits, activations of 4"),
    ],
)
def test_a_graph_says_that_its_widths_are_simulated(weight_max, bits, words, tmp_path):
    """In the file itself, where whoever opens or runs it can see it."""
    path = TEXT["write"](tmp_path / "m.onnx", "y = Conv(x, w)", w=TEXT["normal"](4, 3, 1, 1))
    scheme = QuantScheme(name="s", activations="uint8", ops=("Conv",), weight_max=weight_max, activation_bits=bits)
    model = ir.load(path)

    qdq.insert(model, place(model, scheme), {"x": (-1.0, 1.0)}, scheme)

    ir.save(model, path)
    import onnxruntime

    said = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map.get(qdq.SIMULATED)
    assert said is None if words is None else words in said
