"""Any FP32 graph in the one form that the rest works on, computing what it did."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.graph import simplify  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]


def simplified(folder, body, *, x=(1, 3, 8, 8), to=18, input_shape=None, image=None, **facts):
    """Simplify a graph, check it and its outputs, and return it."""
    before, after = TEXT["write"](folder / "before.onnx", body, x=x, **facts), folder / "after.onnx"
    model = ir.load(before)
    simplify.simplify(model, opset=to, input_shape=input_shape)
    ir.save(model, after)
    onnx.checker.check_model(str(after), full_check=True)
    image = W(*(input_shape or x), seed=9) if image is None else image
    np.testing.assert_allclose(TEXT["run"](after, image), TEXT["run"](before, image), rtol=1e-4, atol=1e-5)
    return onnx.load(str(after))


def ops(model):
    return [node.op_type for node in model.graph.node]


def statistics(channels):
    values = {"s": W(channels, seed=1), "b": W(channels, seed=2), "m": W(channels, seed=3)}
    return values | {"v": np.square(W(channels, seed=4)) + np.float32(0.1)}


@pytest.mark.parametrize(
    ("layer", "shape", "channels", "kept"),
    [
        ("Conv<pads=[1,1,1,1]>(x, w)", (4, 3, 3, 3), 4, ["Conv"]),
        ("Conv(x, w, b)", (4, 3, 1, 1), 4, ["Conv"]),
        ("Conv<group=3, pads=[1,1,1,1]>(x, w)", (3, 1, 3, 3), 3, ["Conv"]),
        ("ConvTranspose(x, w)", (3, 4, 2, 2), 4, ["ConvTranspose"]),
    ],
)
def test_batch_norm_becomes_part_of_the_convolution_before_it(layer, shape, channels, kept, tmp_path):
    body = f"c = {layer} y = BatchNormalization(c, s, b, m, v)"

    assert ops(simplified(tmp_path, body, w=W(*shape), **statistics(channels))) == kept


def test_batch_norm_becomes_part_of_the_linear_layer_before_it(tmp_path):
    body = "c = Gemm<transB=1>(x, w, b) y = BatchNormalization(c, s, b, m, v)"

    assert set(ops(simplified(tmp_path, body, x=(1, 6), w=W(4, 6), **statistics(4)))) <= {"Gemm", "MatMul", "Add"}


def test_batch_norm_of_an_image_stays(tmp_path):
    assert "BatchNormalization" in ops(simplified(tmp_path, "y = BatchNormalization(x, s, b, m, v)", **statistics(3)))


LAYER_NORM = """
    mean = ReduceMean<axes=[-1]{keep}>(x) centred = Sub(x, mean)
    squared = Pow(centred, two) variance = ReduceMean<axes=[-1]{keep}>(squared)
    safe = Add(variance, eps) deviation = Sqrt(safe) normal = Div(centred, deviation)
    scaled = Mul(normal, gamma) y = Add(scaled, beta)
"""


@pytest.mark.parametrize("keep", ["", ", keepdims=1"])
@pytest.mark.parametrize("opset", [11, 14, 17])
def test_layer_norm_written_as_primitives_is_one_operator(opset, keep, tmp_path):
    model = simplified(
        tmp_path,
        LAYER_NORM.format(keep=keep),
        x=(1, 5, 16),
        opset=opset,
        two=np.float32(2),
        eps=np.float32(1e-6),
        gamma=W(16),
        beta=W(16, seed=1),
    )

    assert ops(model) == ["LayerNormalization"]


def test_layer_norm_keeps_its_epsilon(tmp_path):
    model = simplified(
        tmp_path,
        LAYER_NORM.format(keep=""),
        x=(1, 5, 16),
        opset=14,
        image=W(1, 5, 16, scale=1e-3),
        two=np.float32(2),
        eps=np.float32(1e-3),
        gamma=W(16),
        beta=W(16, seed=1),
    )

    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    assert attributes["epsilon"] == pytest.approx(1e-3)


@pytest.mark.parametrize("axes", [(2, 3), (3, 2), (-1, -2), (-2, 3)])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_mean_over_both_spatial_axes_is_global_average_pooling(opset, axes, tmp_path):
    given = f"<axes=[{axes[0]},{axes[1]}]>(x)" if opset < 18 else "(x, axes)"
    arrays = {"axes": np.array(axes)} if opset == 18 else {}

    model = simplified(tmp_path, f"m = ReduceMean{given} y = Conv(m, w)", opset=opset, w=W(4, 3, 1, 1), **arrays)

    assert ops(model) == ["GlobalAveragePool", "Conv"]


def test_a_mean_that_drops_the_spatial_axes_is_flattened(tmp_path):
    body = "m = ReduceMean<keepdims=0>(x, axes) y = MatMul(m, w)"

    model = simplified(tmp_path, body, axes=np.array([2, 3]), w=W(3, 5))

    assert ops(model) == ["GlobalAveragePool", "Flatten", "MatMul"]


@pytest.mark.parametrize(("keep", "shape"), [(1, [1, 3, 1, 1]), (0, [1, 3])])
def test_a_mean_that_leaves_the_graph_keeps_its_name_and_shape(keep, shape, tmp_path):
    model = simplified(tmp_path, f"y = ReduceMean<keepdims={keep}>(x, axes)", axes=np.array([2, 3]))

    assert ops(model)[0] == "GlobalAveragePool"
    output = model.graph.output[0]
    assert output.name == "y"
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == shape


def test_a_mean_that_leaves_the_graph_and_is_read_as_well_keeps_its_name(tmp_path):
    body = "m = ReduceMean<keepdims=0>(x, axes) y = Gemm(m, w)"

    model = simplified(tmp_path, body, outputs=("y", "m"), axes=np.array([2, 3]), w=W(3, 5))

    assert [o.name for o in model.graph.output] == ["y", "m"]


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2), (1, 2, 3)])
def test_a_mean_over_other_axes_stays_one(axes, tmp_path):
    assert "GlobalAveragePool" not in ops(simplified(tmp_path, "y = ReduceMean(x, axes)", axes=np.array(axes)))


def test_a_mean_over_tokens_stays_one(tmp_path):
    body = "y = ReduceMean<keepdims=0>(x, axes)"

    assert ops(simplified(tmp_path, body, x=(1, 5, 8), axes=np.array([1]))) == ["ReduceMean"]


@pytest.mark.parametrize(
    ("body", "shape"),
    [("y = Gemm<transB=1>(x, w, b)", (5, 8)), ("y = Gemm(x, w, b)", (8, 5)), ("y = Gemm(x, w)", (8, 5))],
)
def test_a_gemm_is_written_as_every_other_linear_layer(body, shape, tmp_path):
    arrays = {"w": W(*shape), **({"b": W(5)} if " b)" in body else {})}

    assert ops(simplified(tmp_path, body, x=(3, 8), **arrays)) == ["MatMul", "Add"][: len(arrays)]


def test_weights_that_are_read_both_ways_stay_right(tmp_path):
    body = "h = Gemm<transB=1>(x, w) r = Relu(h) k = Gemm(r, w) l = Relu(k) y = Gemm<transB=1>(l, w)"

    model = simplified(tmp_path, body, x=(1, 8), w=W(5, 8))

    assert ops(model).count("MatMul") == 3
    assert len(model.graph.initializer) == 2


@pytest.mark.parametrize("factor", ["alpha=0.5", "beta=2.0"])
def test_a_gemm_with_a_factor_is_the_same_function(factor, tmp_path):
    simplified(tmp_path, f"y = Gemm<{factor}>(x, w, b)", x=(1, 8), w=W(8, 5), b=W(5))


def test_a_gemm_of_two_activations_is_the_same_function(tmp_path):
    simplified(tmp_path, "t = Tanh(x) y = Gemm<transB=1>(x, t)", x=(3, 8))


def test_padding_becomes_part_of_the_convolution(tmp_path):
    body = "p = Pad(x, pads, zero) y = Conv(p, w)"

    model = simplified(tmp_path, body, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]), zero=np.float32(0), w=W(4, 3, 3, 3))

    assert ops(model) == ["Conv"]


@pytest.mark.parametrize("side", [8, 7])
@pytest.mark.parametrize("form", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_that_a_word_stands_for_is_written_out(form, side, tmp_path):
    body = f'y = Conv<auto_pad="{form}", kernel_shape=[3,3], strides=[2,2]>(x, w)'

    model = simplified(tmp_path, body, x=(1, 3, side, side), w=W(4, 3, 3, 3))

    words = [a.s for n in model.graph.node for a in n.attribute if a.name == "auto_pad"]
    assert words in ([], [b"NOTSET"])


def test_constants_are_folded_and_lifted_and_dead_code_is_gone(tmp_path):
    body = """
        two = Constant<value_float=2.0>() four = Mul(two, two) k = Mul(w, four)
        dead = Conv(x, w) y = Conv(x, k)
    """

    model = simplified(tmp_path, body, w=W(4, 3, 1, 1), unused=W(100))

    assert ops(model) == ["Conv"]
    assert len(model.graph.initializer) == 1


DYNAMIC = """
    c = Conv(x, w) s = Shape(c) n = Gather(s, first) u = Unsqueeze(n, ax) t = Concat<axis=0>(u, rest)
    r = Reshape(c, t) y = MatMul(r, k)
"""
DYNAMIC_ARRAYS = {
    "w": W(4, 3, 1, 1),
    "first": np.array(0),
    "ax": np.array([0]),
    "rest": np.array([-1]),
    "k": W(4 * 48, 2),
}


def test_a_dynamic_input_is_bound_to_a_size_and_the_shapes_fold(tmp_path):
    model = simplified(tmp_path, DYNAMIC, x=("n", 3, "h", "w"), input_shape=(1, 3, 6, 8), **DYNAMIC_ARRAYS)

    assert ops(model) == ["Conv", "Reshape", "MatMul"]
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 6, 8]
    assert sizes["c"] == [1, 4, 6, 8]
    assert sizes["r"] == [1, 192]


def test_a_batch_that_stays_dynamic_runs_at_any_size(tmp_path):
    image = W(5, 3, 6, 8)

    model = simplified(
        tmp_path, DYNAMIC, x=("n", 3, "h", "w"), input_shape=("batch", 3, 6, 8), image=image, **DYNAMIC_ARRAYS
    )

    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 2


def test_every_node_has_a_name_of_its_own(tmp_path):
    before = TEXT["model"]("a = Relu(x) b = Tanh(a) c = Softplus(b) y = Sigmoid(c)")
    for node, name in zip(before.graph.node, ["one", "one", "", ""]):
        node.name = name
    model = ir.from_proto(before)

    simplify.simplify(model, opset=18)

    assert [node.name for node in model.graph] == ["one", "one_1", "Softplus_2", "Sigmoid_3"]


def test_a_name_that_was_made_up_is_nobody_elses(tmp_path):
    before = TEXT["model"]("a = Relu(x) b = Tanh(a) y = Softplus(b)")
    for node, name in zip(before.graph.node, ["a_2", "a", "a"]):
        node.name = name
    model = ir.from_proto(before)

    simplify.simplify(model, opset=18)

    assert len({node.name for node in model.graph}) == 3


@pytest.mark.parametrize("to", [17, 18, 19, 20])
def test_the_graph_comes_out_at_the_opset_that_was_asked_for(to, tmp_path):
    model = simplified(tmp_path, "m = ReduceMean<keepdims=0>(x, axes) y = Softmax(m)", to=to, axes=np.array([1]))

    assert model.opset_import[0].version == to


def test_simplifying_twice_changes_nothing(tmp_path):
    body = "c = Conv(x, w) n = BatchNormalization(c, s, b, m, v) r = Relu(n) y = ReduceMean(r, axes)"
    first = simplified(tmp_path, body, w=W(4, 3, 3, 3), axes=np.array([2, 3]), **statistics(4))
    again = ir.from_proto(first)

    simplify.simplify(again, opset=18)

    assert ir.to_proto(again).graph.node == first.graph.node


def test_an_operator_outside_onnx_is_refused():
    model = ir.from_proto(TEXT["model"]("a = Relu(x) y = my.ops.Swish(a)", domains=("my.ops",), check=False))

    with pytest.raises(Unsupported) as caught:
        simplify.check_operators(model)

    assert str(caught.value) == (
        "layer 'y' is my.ops::Swish, which is outside ONNX's operators; export the model without custom operators"
    )


def test_a_graph_of_onnxs_own_operators_passes():
    simplify.check_operators(ir.from_proto(TEXT["model"]("y = Relu(x)")))


@pytest.mark.parametrize(
    ("equation", "small"),
    [
        ("B C H W, B C H W -> B C H W", "abcd,abcd->abcd"),
        ("aBcd,aBcd->aBcd", "abcd,abcd->abcd"),
        ("abcd,abcd->abcd", "abcd,abcd->abcd"),
    ],
)
def test_the_axes_of_an_einsum_are_small_letters(equation, small, tmp_path):
    """TensorRT refuses capitals; torchvision's MaxViT is written with them."""
    made = simplified(tmp_path, f'y = Einsum<equation="{equation}">(x, r)', r=W(1, 3, 8, 8))

    (node,) = [one for one in made.graph.node if one.op_type == "Einsum"]
    assert onnx.helper.get_node_attr_value(node, "equation").decode() == small


def test_a_pad_that_adds_nothing_is_gone(tmp_path):
    none, one = np.zeros(8, np.int64), np.array([0, 0, 0, 1, 0, 0, 0, 0])

    made = simplified(
        tmp_path, "a = Relu(x) b = Pad(a, none) c = Pad(b, one) d = Neg(c) y = Pad(d, none)", none=none, one=one
    )

    assert ops(made) == ["Relu", "Pad", "Neg"]
