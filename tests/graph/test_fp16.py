"""FP16 as a graph transformation: what becomes FP16, what stays FP32 and why, and that the result is strongly typed."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from rdeploy.backends import reference, tensorrt_rtx  # noqa: E402
from rdeploy.errors import InvariantError, Unsupported  # noqa: E402
from rdeploy.graph import fp16, fp16_keep  # noqa: E402
from rdeploy.quantize.ranges import largest  # noqa: E402
from rdeploy.types import Target  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16

NET = "a = Conv(x, w, b) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) y = MatMul(f, k)"
ARRAYS = {"w": W(6, 3, 3, 3, seed=1), "b": W(6, seed=2), "k": W(6, 5, seed=3)}


def converted(folder, body, *, peaks=None, name="fp16.onnx", **facts):
    """Convert a graph; return what was done, the checked file, and the file of the original."""
    source = TEXT["write"](folder / "fp32.onnx", body, **facts)
    model = ir.load(source)
    done = fp16.convert(model, largest=peaks)
    fp16.check_typed(model)
    ir.save(model, folder / name)
    onnx.checker.check_model(str(folder / name), full_check=True)
    return done, folder / name, source


def types_of(path):
    """Return the element type of every tensor of a graph, by name."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}


def nodes(path, op):
    return [node for node in onnx.load(path).graph.node if node.op_type == op]


def evaluated(path, image):
    """Evaluate a graph operator by operator, in the types that it says."""
    with reference.open_session(path) as session:
        return session.run({"x": image})["y"]


def sqnr_db(exact, found):
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum())


def test_a_plain_network_is_fp16_inside_and_float32_at_its_ends(tmp_path):
    done, path, source = converted(tmp_path, NET, **ARRAYS)
    image = W(1, 3, 8, 8, seed=9)

    types = types_of(path)
    assert (types["x"], types["y"]) == (FLOAT, FLOAT)
    assert {types[name] for name in ("w_fp16", "b_fp16", "k_fp16", "a", "r")} == {HALF}
    assert done.layers == 5
    assert done.kept == (("p", "accumulates"),)
    assert done.weights == 6 * 27 + 6 + 30
    for run in (TEXT["run"], evaluated):
        assert sqnr_db(TEXT["run"](source, image), run(path, image)) > 50


def test_casts_stand_only_where_the_type_changes(tmp_path):
    done, path, _ = converted(tmp_path, NET, **ARRAYS)

    # The image, into the pooling and out of it, the output.
    assert [(n.input[0], n.output[0]) for n in nodes(path, "Cast")] == [
        ("x", "x_fp16"), ("r", "r_fp32"), ("p", "p_fp16"), ("y_inner", "y"),
    ]  # fmt: skip
    assert done.casts == 4


def test_what_lies_between_fp32_layers_stays_with_them_and_readers_share_a_cast(tmp_path):
    body = """s = Softmax<axis=1>(x) t = Transpose<perm=[0,2,3,1]>(s) u = Identity(t) e = ReduceMean<keepdims=1>(u)
              a = Conv(s, w) b = Conv(s, w) c = Add(a, b) y = Relu(c)"""
    done, path, _ = converted(tmp_path, body, outputs=("y", "e"), w=W(2, 3, 1, 1))

    assert [(n.input[0], n.output[0]) for n in nodes(path, "Cast")] == [("s", "s_fp16"), ("y_inner", "y")]
    assert dict(done.kept) == {
        "s": "accumulates", "t": fp16_keep.BETWEEN, "u": fp16_keep.BETWEEN, "e": "accumulates",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "layer", "reason"),
    [
        ("n = LayerNormalization<axis=-1>(x, g) y = Relu(n)", "n", "accumulates"),
        ("n = Pow(x, two) y = Relu(n)", "n", "has a large range"),
        ("m = Relu(x) n = Div(x, m) y = Relu(n)", "n", "divides by an activation"),
        ("n = CumSum(x, axis) y = Relu(n)", "n", "accumulates"),
    ],
)
def test_layers_that_need_fp32_are_named_with_the_reason(body, layer, reason, tmp_path):
    constants = {"g": np.ones(8, np.float32), "two": np.float32(2), "axis": np.int64(1)}
    done, path, _ = converted(tmp_path, body, **{name: v for name, v in constants.items() if name in body})

    assert dict(done.kept)[layer] == reason
    assert types_of(path)[layer] == FLOAT


def test_a_quotient_by_a_constant_is_fp16(tmp_path):
    done, _, _ = converted(tmp_path, "a = Conv(x, w) b = Div(a, c) y = Relu(b)", c=np.float32(8), w=W(2, 3, 1, 1))

    assert done.kept == ()


def test_an_activation_that_overflows_keeps_its_layer_and_its_readers_in_fp32(tmp_path):
    """x reaches 1; 300 x 300 = 90,000 is beyond FP16, and back at 90 everything is FP16 again."""
    body = "a = Conv(x, big) b = Mul(a, scale) c = Mul(b, small) d = Conv(c, one) y = Add(d, d)"
    each = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    constants = {"big": each * 300, "scale": np.float32(300), "small": np.float32(1e-3), "one": each}
    image = np.full((1, 3, 8, 8), 0.5, np.float32)
    image[0, 0, 0, 0] = 1.0
    source = TEXT["write"](tmp_path / "plain.onnx", body, **constants)

    peaks = largest(source, [image / 2, image])
    done, path, _ = converted(tmp_path, body, peaks=peaks, **constants)
    blind, naive, _ = converted(tmp_path, body, name="naive.onnx", **constants)

    assert peaks == pytest.approx({"x": 1, "a": 300, "b": 90_000, "c": 90, "d": 90, "y": 180})
    assert dict(done.kept) == {
        "b": "its output reaches 90000 on the calibration images",
        "c": "reads 'b', which reaches 90000 on the calibration images",
    }
    assert evaluated(path, image).max() == pytest.approx(180, rel=2e-3)
    assert blind.kept == ()
    with np.errstate(over="ignore"):
        assert np.isinf(evaluated(naive, image)).any()


def test_an_activation_below_fp16s_normal_range_keeps_its_layer_and_its_readers_in_fp32(tmp_path):
    body = "a = Conv(x, tiny) b = Conv(a, large) y = Conv(b, w)"
    constants = {"tiny": W(2, 3, 1, 1) * 1e-3, "large": W(2, 2, 1, 1), "w": W(2, 2, 1, 1)}

    small, _, _ = converted(tmp_path, body, peaks={"x": 1.0, "a": 5e-6, "b": 0.2}, **constants)
    zero, _, _ = converted(tmp_path, body, name="zero.onnx", peaks={"x": 1.0, "a": 0.0, "b": 0.2}, **constants)

    assert dict(small.kept) == {
        "a": "its output reaches no more than 5e-06 on the calibration images",
        "b": "reads 'a', which reaches no more than 5e-06 on the calibration images",
    }
    assert zero.kept == ()


def test_there_is_a_margin_for_images_that_were_not_seen(tmp_path):
    for peak, kept in ((65504 / 4 - 1, 0), (65504 / 4 + 1, 2)):
        done, _, _ = converted(
            tmp_path, "a = Conv(x, w) y = Conv(a, v)", peaks={"a": peak}, w=W(2, 3, 1, 1), v=W(2, 2, 1, 1)
        )
        assert len(done.kept) == kept


def test_weights_that_do_not_survive_the_rounding_stay_fp32(tmp_path):
    tiny, huge = np.full((3, 3, 1, 1), 1e-6, np.float32), np.full((3, 3, 1, 1), 1e5, np.float32)
    done, path, source = converted(
        tmp_path, "a = Conv(x, t) b = Conv(a, h) y = Conv(b, w)", t=tiny, h=huge, w=W(2, 3, 1, 1)
    )
    image = W(1, 3, 8, 8)

    assert dict(done.kept) == {
        "a": "its constant 't' would be off by 1.33% (100% of it below FP16's normal range)",
        "b": "its constant 'h' holds values beyond 65504",
    }
    assert sqnr_db(TEXT["run"](source, image), evaluated(path, image)) > 60


def test_a_few_denormal_weights_are_counted_and_change_nothing(tmp_path):
    weight = W(8, 3, 3, 3)
    weight[0, 0, 0] = (1e-6, 2e-6, 0.0)
    done, _, _ = converted(tmp_path, "y = Conv(x, w)", w=weight)

    assert (done.kept, done.denormals, done.weights) == ((), 2, 8 * 27)


def test_minus_infinity_in_a_mask_is_a_constant_like_another(tmp_path):
    mask = np.zeros((8, 8), np.float32)
    mask[0, 0] = -np.inf

    body = "a = Conv(x, w) b = Add(a, m) y = Conv(b, v)"
    weights = {"w": W(2, 3, 1, 1), "v": W(2, 2, 1, 1)}

    assert converted(tmp_path, body, m=mask, **weights)[0].kept == ()
    mask[0, 0] = -3.4e38
    assert dict(converted(tmp_path, body, m=mask, **weights)[0].kept) == {
        "b": "its constant 'm' holds values beyond 65504"
    }


def test_the_scales_of_resize_and_integer_tensors_are_left_alone(tmp_path):
    body = """h = Shape(x) c = Cast<to=1>(h) g = ReduceProd<keepdims=0>(c) a = Conv(x, w)
              r = Resize<mode="linear">(a, , s) y = Mul(r, g)"""
    scales = np.array([1, 1, 2, 2], np.float32)
    _, path, source = converted(tmp_path, body, s=scales, w=W(2, 3, 1, 1), check=False)
    image = W(1, 3, 8, 8)

    assert types_of(path)["s"] == FLOAT
    assert nodes(path, "Shape")[0].input[0] == "x"
    assert sqnr_db(TEXT["run"](source, image), TEXT["run"](path, image)) > 50


def test_an_output_that_is_read_inside_keeps_its_name_and_type(tmp_path):
    _, path, _ = converted(
        tmp_path, "y = Conv(x, w) z = Conv(y, v)", outputs=("y", "z"), w=W(2, 3, 1, 1), v=W(2, 2, 1, 1)
    )

    assert [(o.name, o.type.tensor_type.elem_type) for o in onnx.load(path).graph.output] == [
        ("y", FLOAT),
        ("z", FLOAT),
    ]
    assert len(nodes(path, "Cast")) == 3


QDQ = """
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) k = DequantizeLinear<axis=0>(w, t) a = Conv(d, k, b) r = Relu(a)
    q2 = QuantizeLinear(r, s2, z) d2 = DequantizeLinear(q2, s2, z) p = GlobalAveragePool(d2) k2 = DequantizeLinear<axis=0>(w2, t2)
    c = Conv(d2, k2) e = Add(c, p) y = Relu(e)
"""


def quantized(**changes):
    integers = np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)
    return {
        "w": integers, "t": np.full(4, 0.01, np.float32), "b": W(4), "s": np.float32(0.05), "z": np.int8(0),
        "s2": np.float32(0.1), "w2": np.resize(integers, (4, 4, 1, 1)), "t2": np.full(4, 0.02, np.float32), **changes,
    }  # fmt: skip


def test_q_dq_pairs_take_the_types_of_their_neighbours(tmp_path):
    done, path, source = converted(tmp_path, QDQ, **quantized())
    types, image = types_of(path), W(1, 3, 8, 8)

    assert onnx.load(path).opset_import[0].version == 19
    assert nodes(path, "QuantizeLinear")[0].input[0] == "x"  # the image is quantized as it comes
    assert {types[name] for name in ("d", "k", "a", "r", "d2", "k2", "c", "b_fp16", "t_fp16")} == {HALF}
    assert {types[name] for name in ("d2_fp32", "p", "s")} == {FLOAT}  # the pooling has a DQ of its own
    assert types["w"] == onnx.TensorProto.INT8
    assert done.kept == (("p", "accumulates"),)
    assert [n.output[0] for n in nodes(path, "Cast")] == ["p_fp16", "y"]
    assert sqnr_db(evaluated(source, image), evaluated(path, image)) > 40


def test_a_scale_that_fp16_cannot_hold_keeps_its_layer_in_fp32(tmp_path):
    done, path, source = converted(tmp_path, QDQ, **quantized(t2=np.full(4, 1e-6, np.float32)))
    image = W(1, 3, 8, 8)

    assert dict(done.kept)["c"] == fp16_keep.SCALE
    assert types_of(path)["k2"] == FLOAT
    assert sqnr_db(evaluated(source, image), evaluated(path, image)) > 40


def test_the_scale_of_a_dead_channel_does_not_count_and_never_becomes_zero(tmp_path):
    weight = quantized()["w"]
    weight[0] = 0
    done, path, _ = converted(tmp_path, QDQ, **quantized(w=weight, t=np.array([1e-12, 0.01, 0.01, 0.01], np.float32)))
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}

    assert "a" not in dict(done.kept)
    assert stored["t_fp16"].min() == np.float16(2.0**-24)


def test_a_branch_is_refused(tmp_path):
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["x"], ["n"])], "b", [], [onnx.helper.make_tensor_value_info("n", FLOAT, None)]
    )
    model = TEXT["model"]("y = Relu(x)")
    model.graph.node.add().CopyFrom(
        onnx.helper.make_node("If", ["c"], ["z"], name="choice", then_branch=branch, else_branch=branch)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))

    with pytest.raises(Unsupported) as caught:
        fp16.convert(ir.from_proto(model))

    assert str(caught.value) == "layer 'choice' is If, a branch or a loop, which has no FP16 form here"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.graph.outputs[0], "dtype", ir.DataType.FLOAT16), "'y' is FP16, but inputs and outputs"),
        (lambda m: setattr(m.graph.initializers["b_fp16"], "dtype", ir.DataType.FLOAT), "'a' .Conv. reads FP32 and FP16"),
        (lambda m: setattr(m.graph.inputs[0], "dtype", ir.DataType.FLOAT16), "'x' is FP16"),
        (lambda m: setattr(m.graph[-1].inputs[0], "dtype", ir.DataType.FLOAT), "changes nothing"),
    ],
)  # fmt: skip
def test_a_graph_that_is_not_strongly_typed_does_not_pass(change, message, tmp_path):
    model = ir.load(converted(tmp_path, NET, **ARRAYS)[1])
    fp16.check_typed(model)

    change(model)

    with pytest.raises(InvariantError, match=message):
        fp16.check_typed(model)


@pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))
@pytest.mark.parametrize(
    ("body", "arrays", "executed"), [(NET, ARRAYS, {"fp16"}), (QDQ, quantized(), {"int8"})], ids=["fp16", "int8+fp16"]
)
def test_the_strongly_typed_builder_takes_it_and_computes_in_it(body, arrays, executed, tmp_path):
    _, path, _ = converted(tmp_path, body, **arrays)
    target = Target(name="t", compute_capabilities=("sm_89",))

    engine = tensorrt_rtx.build_engine(path, tmp_path / "e", target=target, options=tensorrt_rtx.Options())

    assert set(dict(engine.executed_precision)) & {"fp16", "fp32", "int8"} == executed
