"""Where the work of a graph is, on graphs whose MACs can be counted by hand."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

from rdeploy.graph import work  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]


def test_depthwise_and_narrow_convolutions_are_told_apart(tmp_path):
    body = "a = Conv(x, w) d = Conv<group=32, pads=[1,1,1,1]>(a, v) y = Conv(d, u)"
    path = TEXT["write"](tmp_path / "m.onnx", body, w=W(32, 3, 1, 1), v=W(32, 1, 3, 3), u=W(64, 32, 1, 1))

    found = work.read(path)

    stem, depthwise, last = 64 * 32 * 3, 64 * 32 * 9, 64 * 64 * 32
    assert found.macs == stem + depthwise + last
    assert found.depthwise == pytest.approx(depthwise / found.macs)
    assert found.narrow == pytest.approx(stem / found.macs)  # three channels come in
    assert (found.attention, found.tokens) == (0, 0)


def test_attention_counts_its_products_and_its_tokens(tmp_path):
    body = """r = Reshape(x, s) t = Transpose<perm=[0,2,1]>(r) q = MatMul(t, w) k = Transpose<perm=[0,2,1]>(q) e = MatMul(q, k)
              p = Softmax<axis=-1>(e) y = MatMul(p, q)"""
    path = TEXT["write"](tmp_path / "m.onnx", body, x=(1, 16, 8, 8), s=np.array([1, 16, 64]), w=W(16, 16))

    found = work.read(path)

    linear, products = 64 * 16 * 16, 2 * 64 * 64 * 16
    assert found.tokens == 64
    assert found.attention == pytest.approx(products / (linear + products))
    assert found.narrow == 0
