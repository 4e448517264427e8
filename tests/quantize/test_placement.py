"""Where Q/DQ pairs go, on graphs of a few nodes each."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool", "Concat")
SCHEME = QuantScheme(name="test", activations="uint8", ops=OPS)
WRITES_INTEGERS = dataclasses.replace(SCHEME, output_ops=("Conv",))


def placed(body, *, scheme=SCHEME, keep_float=(), **facts):
    return place(ir.from_proto(TEXT["model"](body, **facts)), scheme, keep_float=keep_float)


def reads(placement):
    """Return what is read quantized, as {"tensor": ["reader"]}."""
    return {name: [node.name for node, _ in readers] for name, readers in placement.reads.items()}


def weights(placement):
    return {node.name: axis for node, axis in placement.weights.items()}


CHAIN = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) y = Conv(r, v)"


def test_convolutions_read_their_inputs_and_weights_quantized():
    placement = placed(CHAIN, w=W(4, 3, 3, 3), v=W(5, 4, 1, 1))

    assert reads(placement) == {"x": ["c"], "r": ["y"]}
    assert weights(placement) == {"c": 0, "y": 0}
    assert placement.skipped == []


def test_a_downscale_between_convolutions_stays_in_integers():
    smooth = """
        c = Conv<pads=[1,1,1,1]>(x, w) p = Pad<mode="edge">(c, b) s = Conv<group=4>(p, k) m = Resize<mode="linear">(s, , f)
        r = Relu(m) y = Conv(r, v)
    """
    facts = {
        "w": W(4, 3, 3, 3),
        "b": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "k": W(4, 1, 3, 3),
        "f": np.array([1, 1, 0.75, 0.75], np.float32),
        "v": W(5, 4, 1, 1),
    }

    placement = placed(smooth, **facts)

    assert reads(placement) == {"x": ["c"], "p": ["s"], "r": ["y"], "c": ["p"]}
    assert placement.shared == [{"c", "p"}]
    zeros = placed(smooth.replace("edge", "constant"), **facts)
    assert reads(zeros) == {"x": ["c"], "p": ["s"], "r": ["y"]}


def test_an_average_pooling_reads_what_a_convolution_wrote_and_nothing_else_new():
    pooled = (
        "c = Conv<pads=[1,1,1,1]>(x, w) p = AveragePool<kernel_shape=[2,2],strides=[2,2]>(c) r = Relu(p) y = Conv(r, v)"
    )
    weights = {"w": W(4, 3, 3, 3), "v": W(5, 4, 1, 1)}

    assert reads(placed(pooled, **weights)) == {"x": ["c"], "r": ["y"], "c": ["p"]}
    assert reads(placed(pooled.replace("y = Conv(r, v)", "y = Tanh(r)"), w=W(4, 3, 3, 3))) == {"x": ["c"]}
    assert reads(placed(pooled.replace("c = Conv<pads=[1,1,1,1]>(x, w)", "c = Tanh(x)"), v=W(5, 3, 1, 1))) == {
        "r": ["y"]
    }


def test_only_the_operators_of_the_scheme_are_quantized():
    scheme = dataclasses.replace(SCHEME, ops=("Gemm",))

    placement = placed(CHAIN, scheme=scheme, w=W(4, 3, 3, 3), v=W(5, 4, 1, 1))

    assert reads(placement) == {}
    assert weights(placement) == {}


def test_a_layer_that_is_kept_in_float_says_so_and_its_neighbours_stay_quantized():
    placement = placed(CHAIN, keep_float=["c"], w=W(4, 3, 3, 3), v=W(5, 4, 1, 1))

    assert reads(placement) == {"r": ["y"]}
    assert placement.skipped == [("c", "kept in float on request")]


@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_an_output_is_quantized_after_what_the_kernel_absorbs(op):
    arguments = "c, low, high" if op == "Clip" else "c"
    limits = {"low": np.float32(0), "high": np.float32(6)} if op == "Clip" else {}

    placement = placed(
        f"c = Conv(x, w) r = {op}({arguments}) s = Softplus(r) y = Add(r, s)",
        scheme=dataclasses.replace(WRITES_INTEGERS, residual="none"),
        w=W(4, 3, 1, 1),
        **limits,
    )

    assert reads(placement) == {"x": ["c"], "r": ["s", "y"]}


def test_an_output_without_a_fused_activation_is_quantized_itself_before_silu():
    body = "c = Conv(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v)"
    arrays = {"w": W(4, 3, 1, 1), "v": W(2, 4, 1, 1)}

    assert reads(placed(body, scheme=WRITES_INTEGERS, **arrays)) == {"x": ["c"], "c": ["s", "m"], "m": ["y"]}
    assert reads(placed(body, **arrays)) == {"x": ["c"], "m": ["y"]}


def test_a_relu_that_is_not_alone_in_reading_is_not_absorbed():
    placement = placed("c = Conv(x, w) r = Relu(c) t = Tanh(c) y = Mul(r, t)", scheme=WRITES_INTEGERS, w=W(4, 3, 1, 1))

    assert reads(placement) == {"x": ["c"], "c": ["r", "t"]}


@pytest.mark.parametrize("body", ["y = Conv(x, w)", "c = Conv(x, w) y = Relu(c)"])
def test_the_output_of_the_graph_is_not_quantized(body):
    assert list(reads(placed(body, scheme=WRITES_INTEGERS, w=W(4, 3, 1, 1)))) == ["x"]


def test_a_convolution_whose_float_output_leaves_the_graph_keeps_it():
    placement = placed("c = Conv(x, w) y = Relu(c)", scheme=WRITES_INTEGERS, outputs=("c", "y"), w=W(4, 3, 1, 1))

    assert reads(placement) == {"x": ["c"]}


def test_a_depthwise_convolution_has_its_channels_on_axis_0():
    placement = placed("y = Conv<group=3, pads=[1,1,1,1]>(x, w)", w=W(3, 1, 3, 3))

    assert weights(placement) == {"y": 0}


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("y = Gemm<transB=1>(x, w)", (5, 8), 0),
        ("y = Gemm(x, w)", (8, 5), 1),
        ("y = MatMul(x, w)", (8, 5), 1),
    ],
)
def test_a_linear_layer_has_one_scale_per_output(body, shape, axis):
    assert weights(placed(body, x=(1, 8), w=W(*shape))) == {"y": axis}


def test_a_matmul_of_three_dimensions_has_its_outputs_last():
    assert weights(placed("y = MatMul(x, w)", x=(2, 4, 8), w=W(8, 5))) == {"y": 1}


def test_a_transposed_convolution_has_its_outputs_on_axis_1():
    assert weights(placed("y = ConvTranspose(x, w)", w=W(3, 4, 2, 2))) == {"y": 1}


@pytest.mark.parametrize("factor", ["alpha", "beta"])
def test_a_gemm_with_a_factor_stays_in_float(factor):
    placement = placed(f"y = Gemm<{factor}=0.5>(x, w, b)", x=(1, 8), w=W(8, 5), b=W(5))

    assert weights(placement) == {}
    assert placement.skipped == [("y", "Gemm with alpha or beta")]


def test_a_layer_of_constants_stays_in_float():
    placement = placed("k = MatMul(a, w) y = Add(x, k)", x=(1, 5), a=W(1, 8), w=W(8, 5))

    assert placement.skipped == [("k", "its input is constant")]


def test_weights_that_two_layers_share_are_placed_for_both():
    placement = placed("a = Conv(x, w) r = Relu(a) y = Conv(r, w)", w=W(3, 3, 1, 1))

    assert weights(placement) == {"a": 0, "y": 0}


def test_weights_that_are_shared_along_another_axis_stay_in_float_there():
    placement = placed("h = Gemm(x, w) r = Relu(h) y = Gemm<transB=1>(r, w)", x=(1, 8), w=W(8, 5))

    assert weights(placement) == {"h": 1}
    assert placement.skipped == [("y", "shares its weights with a layer that lays them out otherwise")]


RESIDUAL = """
    s = Conv(x, w) a = Relu(s)
    c = Conv<pads=[1,1,1,1]>(a, u) sum = Add(c, a) r = Relu(sum) y = Conv(r, v)
"""
ARRAYS = {"w": W(4, 3, 1, 1), "u": W(4, 4, 3, 3), "v": W(2, 4, 1, 1)}


def test_both_inputs_of_a_residual_sum_are_quantized_and_what_leaves_it():
    placement = placed(RESIDUAL, scheme=dataclasses.replace(SCHEME, residual="all"), **ARRAYS)

    assert reads(placement) == {"x": ["s"], "a": ["c", "sum"], "r": ["y"], "c": ["sum"]}


def test_the_side_of_the_convolution_stays_in_float_where_the_runtime_fuses_it():
    placement = placed(RESIDUAL, scheme=dataclasses.replace(SCHEME, residual="branch"), **ARRAYS)

    assert reads(placement) == {"x": ["s"], "a": ["c", "sum"], "r": ["y"]}


def test_of_two_convolutions_the_second_is_the_branch_where_it_is_quantized_anyway():
    body = "a = Conv(x, w) b = Conv(x, u) s = Conv(b, v) sum = Add(a, b) y = Relu(sum)"
    arrays = {"w": W(4, 3, 1, 1), "u": W(4, 3, 1, 1), "v": W(2, 4, 1, 1)}

    placement = placed(body, scheme=dataclasses.replace(SCHEME, residual="branch"), outputs=("y", "s"), **arrays)

    assert reads(placement) == {"x": ["a", "b"], "b": ["s", "sum"]}


def test_a_residual_sum_stays_in_float_on_request():
    placement = placed(RESIDUAL, scheme=dataclasses.replace(SCHEME, residual="none"), **ARRAYS)

    assert reads(placement) == {"x": ["s"], "a": ["c"], "r": ["y"]}


def test_adding_a_constant_is_no_residual():
    placement = placed("c = Conv(x, w) s = Add(c, b) y = Conv(s, v)", w=W(4, 3, 1, 1), b=W(1, 4, 1, 1), v=W(2, 4, 1, 1))

    assert reads(placement) == {"x": ["c"], "s": ["y"]}


def test_a_sum_within_an_activation_function_is_no_residual():
    """GELU's tanh form adds a value and its cube: the cube alone would take all the range."""
    gelu = """
        c = Conv(x, w) cubed = Pow(c, three) small = Mul(cubed, k) inner = Add(c, small) bent = Tanh(inner) more = Add(bent, one)
        g = Mul(c, more) y = Conv(g, v)
    """
    numbers = {"three": np.array(3, np.float32), "k": np.array(0.044, np.float32), "one": np.array(1, np.float32)}
    scheme = dataclasses.replace(WRITES_INTEGERS, residual="all")

    placement = placed(gelu, scheme=scheme, w=W(4, 3, 1, 1), v=W(5, 4, 1, 1), **numbers)

    assert set(reads(placement)) == {"x", "c", "g"}


def test_a_transformers_residual_stream_stays_in_float():
    body = """
        a = MatMul(x, w) h = Add(a, x) n = LayerNormalization<axis=-1>(h, g) m = MatMul(n, w) y = Add(m, h)
    """

    placement = placed(body, x=(1, 4, 8), w=W(8, 8), g=W(8))

    assert reads(placement) == {"x": ["a"], "n": ["m"]}


def test_the_inputs_of_a_concat_share_the_range_of_its_output():
    body = "a = Conv(x, w) b = MaxPool<kernel_shape=[1,1]>(x) j = Concat<axis=1>(a, b) y = Conv(j, v)"

    placement = placed(body, w=W(4, 3, 1, 1), v=W(2, 7, 1, 1))

    assert reads(placement) == {"x": ["a"], "j": ["y"], "a": ["j"], "b": ["j"]}
    assert placement.shared == [{"a", "b", "j", "x"}]  # x and b too: a max pooling moves integers


def test_a_concat_of_token_sequences_reads_float():
    body = "a = MatMul(x, w) t = Tanh(x) j = Concat<axis=1>(a, t) y = MatMul(j, v)"

    placement = placed(body, x=(1, 8, 3), w=W(3, 3), v=W(3, 2))

    assert reads(placement) == {"x": ["a"], "j": ["y"]}
    assert placement.shared == []


def test_a_layer_behind_joined_token_sequences_stays_float_where_the_runtime_cannot_load_it():
    body = "t = Tanh(x) j = Concat<axis=1>(x, t) y = MatMul(j, v)"
    scheme = dataclasses.replace(WRITES_INTEGERS, joined_tokens=False)

    placement = placed(body, scheme=scheme, x=(1, 8, 3), v=W(3, 2))

    assert reads(placement) == {}
    assert placement.skipped == [("y", "reads joined token sequences, which this runtime cannot load in integers")]


def test_concats_that_feed_each_other_share_one_range():
    body = """
        a = Conv(x, w) j = Concat<axis=1>(a, x) b = Conv(j, v)
        k = Concat<axis=1>(b, j) t = Tanh(x) l = Concat<axis=1>(t, a) m = Conv(l, v) y = Conv(k, u)
    """
    arrays = {"w": W(4, 3, 1, 1), "v": W(2, 7, 1, 1), "u": W(2, 9, 1, 1)}

    placement = placed(body, outputs=("y", "m"), **arrays)

    assert placement.shared == [{"a", "b", "j", "k", "l", "t", "x"}]


def test_a_max_pooling_between_quantized_convolutions_moves_integers():
    body = "c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape=[2,2]>(r) y = Conv(p, v)"
    arrays = {"w": W(4, 3, 1, 1), "v": W(2, 4, 1, 1)}

    assert placed(body, scheme=WRITES_INTEGERS, **arrays).shared == [{"p", "r"}]
    assert placed(body, **arrays).shared == []


def test_a_max_pooling_in_front_of_an_integer_kernel_reads_integers():
    body = "c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape=[2,2]>(r) q = MaxPool<kernel_shape=[2,2]>(p) y = Conv(q, v)"
    arrays = {"w": W(4, 3, 1, 1), "v": W(2, 4, 1, 1)}

    placement = placed(body, scheme=dataclasses.replace(SCHEME, ops=(*SCHEME.ops, "MaxPool")), **arrays)

    assert reads(placement) == {"x": ["c"], "q": ["y"], "p": ["q"], "r": ["p"]}
    assert placement.shared == [{"p", "q", "r"}]


def test_a_max_pooling_in_front_of_floats_stays_in_float():
    body = "c = Conv(x, w) p = MaxPool<kernel_shape=[2,2]>(c) y = Tanh(p)"

    placement = placed(body, scheme=dataclasses.replace(SCHEME, ops=(*SCHEME.ops, "MaxPool")), w=W(4, 3, 1, 1))

    assert reads(placement) == {"x": ["c"]}


@pytest.mark.parametrize(
    ("body", "arrays"),
    [
        ("a = Conv(x, w) j = Concat<axis=1>(a, k) y = Conv(j, v)", {"k": W(1, 3, 8, 8)}),
        ("a = Conv(x, w) j = Concat<axis=1>(a, x) t = Tanh(j) y = Conv(t, v)", {}),
    ],
)
def test_a_concat_that_holds_a_constant_or_feeds_no_integers_is_left_alone(body, arrays):
    placement = placed(body, w=W(4, 3, 1, 1), v=W(2, 7, 1, 1), **arrays)

    assert placement.shared == []
    assert "a" not in placement.reads


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "AveragePool<kernel_shape=[2,2]>"])
def test_pooling_of_integers_writes_integers(pool):
    body = f"c = Conv(x, w) r = Relu(c) p = {pool}(r) t = Tanh(p) u = Conv(r, v) y = GlobalMaxPool(u)"

    placement = placed(body, scheme=WRITES_INTEGERS, outputs=("y", "t"), w=W(4, 3, 1, 1), v=W(2, 4, 1, 1))

    assert reads(placement) == {"x": ["c"], "r": ["p", "u"], "p": ["t"], "u": ["y"]}


def test_pooling_of_floats_stays_in_float():
    assert reads(placed("t = Tanh(x) p = GlobalAveragePool(t) y = Conv(p, w)", w=W(4, 3, 1, 1))) == {"p": ["y"]}


VIT = """
    e = Conv<strides=[4,4], kernel_shape=[4,4]>(x, patch)
    f = Reshape(e, shape) t = Transpose<perm=[0,2,1]>(f)
    n = LayerNormalization<axis=-1>(t, g)
    q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)
    kt = Transpose<perm=[0,2,1]>(k) logits = MatMul(q, kt) p = Softmax<axis=-1>(logits) mix = MatMul(p, v)
    o = MatMul(mix, wo) y = Add(o, t)
"""
VIT_ARRAYS = {
    "patch": W(6, 3, 4, 4),
    "shape": np.array([1, 6, 4]),
    "g": W(6),
    **{f"w{name}": W(6, 6, seed=i) for i, name in enumerate("qkvo")},
}


def test_attention_and_the_patch_embedding_stay_in_float():
    placement = placed(VIT, **VIT_ARRAYS)

    assert set(weights(placement)) == {"q", "k", "v", "o"}
    assert reads(placement) == {"n": ["q", "k", "v"], "mix": ["o"]}
    assert placement.skipped == [
        ("e", "patch embedding"),
        ("logits", "multiplies two activations (attention)"),
        ("mix", "multiplies two activations (attention)"),
    ]


def test_a_scheme_can_ask_for_attention_as_well():
    scheme = dataclasses.replace(SCHEME, products="all", patches=True)

    placement = placed(VIT, scheme=scheme, **VIT_ARRAYS)

    assert set(weights(placement)) == {"e", "q", "k", "v", "o"}
    found = reads(placement)
    assert {name: found[name] for name in ("x", "q", "kt", "p", "v")} == {
        "x": ["e"], "q": ["logits"], "kt": ["logits"], "p": ["mix"], "v": ["mix"]
    }  # fmt: skip
    assert placement.skipped == []
    left = reads(placed(VIT, scheme=scheme, keep_float=["logits"], **VIT_ARRAYS))
    assert "q" not in left
    assert "kt" not in left
    assert "p" in left


def test_what_a_softmax_puts_out_can_stay_in_float():
    placement = placed(VIT, scheme=dataclasses.replace(SCHEME, products="scores", patches=True), **VIT_ARRAYS)

    found = reads(placement)
    assert {"q", "kt", "x"} <= set(found)
    assert {"p", "v"}.isdisjoint(found)
    assert placement.skipped == [("mix", "multiplies two activations (attention)")]


def test_the_first_convolution_is_quantized_where_there_is_no_attention():
    placement = placed("y = Conv<strides=[4,4], kernel_shape=[4,4]>(x, patch)", patch=W(6, 3, 4, 4))

    assert set(weights(placement)) == {"y"}


def test_an_overlapping_stem_is_no_patch_embedding():
    body = VIT.replace("strides=[4,4], kernel_shape=[4,4]", "strides=[4,4], kernel_shape=[5,5], pads=[1,1,1,1]")

    placement = placed(body, **{**VIT_ARRAYS, "patch": W(6, 3, 5, 5)})

    assert "e" in weights(placement)


def test_placing_leaves_the_graph_alone():
    model = ir.from_proto(TEXT["model"](RESIDUAL, **ARRAYS))
    before = ir.to_proto(model).SerializeToString(deterministic=True)

    place(model, WRITES_INTEGERS)

    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
