"""Blocks are found by what is live between nodes, whatever the nodes are called."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import blocks  # noqa: E402
from rdeploy.quantize.placement import weighted_nodes  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SQUARE = W(3, 3, 1, 1)


def ends(body, **facts):
    graph = ir.from_proto(TEXT["model"](body, **facts)).graph
    return blocks.ends(graph, set(weighted_nodes(graph)))


def test_a_residual_block_ends_behind_the_activation_that_follows_its_sum():
    body = """
        a = Conv(x, w) r = Relu(a) b = Conv(r, w) c = Relu(b) d = Conv(c, w) s = Add(d, r) t = Relu(s)
        e = Conv(t, w) f = Add(e, t) y = Conv(f, w)
    """

    assert ends(body, w=SQUARE) == {"r", "t", "f"}


def test_an_inverted_residual_is_one_block_with_its_sum_or_without():
    body = """
        a = Conv(x, w) ar = Relu(a) b = Conv<group=3>(ar, g) br = Relu(b) c = Conv(br, w)
        d = Conv(c, w) dr = Relu(d) e = Conv<group=3>(dr, g) er = Relu(e) f = Conv(er, w)
        h = Conv(f, w) hr = Relu(h) i = Conv<group=3>(hr, g) j = Relu(i) k = Conv(j, w) s = Add(k, f)
        y = Conv(s, w)
    """

    assert ends(body, w=SQUARE, g=W(3, 1, 1, 1)) == {"c", "f", "s"}


def test_attention_and_the_mlp_behind_it_are_two_blocks():
    norm = "LayerNormalization"
    body = f"""
        n = {norm}(x, s) q = MatMul(n, w) k = MatMul(n, w) v = MatMul(n, w) kt = Transpose<perm=[0,2,1]>(k)
        p = MatMul(q, kt) m = Softmax(p) o = MatMul(m, v) z = MatMul(o, w) zb = Add(z, b) r = Add(zb, x)
        n2 = {norm}(r, s) u = MatMul(n2, w) ub = Add(u, b) g = Relu(ub) d = MatMul(g, w) db = Add(d, b) r2 = Add(db, r)
        n3 = {norm}(r2, s) h = MatMul(n3, w) y = Add(h, b)
    """
    found = ends(body, x=(1, 5, 6), w=W(6, 6), s=W(6), b=W(6))

    assert found == {"r", "n3"}


def test_a_gate_made_of_several_operators_does_not_end_a_block():
    body = "a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) b = Conv(m, w) t = Sigmoid(b) y = Mul(b, t)"

    assert ends(body, w=SQUARE) == frozenset()


def test_what_one_live_activation_cannot_part_is_cut_where_two_are_live():
    """A long branch beside the stream, as in a U-Net."""
    layers = " ".join(f"c{i + 1} = Conv(c{i}, w)" for i in range(12))
    found = ends(f"c0 = Relu(x) {layers} y = Add(c12, c0)", w=SQUARE)

    assert found == {"c3", "c6", "c9"}
