"""Queries x keys in integers for a runtime that is faster with them: signed, kept where they cost little, and rankable."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import check, recipe, scores, sensitivity  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
PLAIN = QuantScheme(name="plain", activations="uint8", ops=("Conv", "MatMul"))
SCHEME = dataclasses.replace(PLAIN, name="s", integer_attention=True)
BODY = """e = Conv<strides=[4,4], kernel_shape=[4,4]>(x, patch) f = Reshape(e, shape) n = Transpose<perm=[0,2,1]>(f)
          q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv) kt = Transpose<perm=[0,2,1]>(k) g = MatMul(q, kt)
          p = Softmax(g) m = MatMul(p, v) y = MatMul(m, wo)"""
ARRAYS = {
    "patch": W(8, 3, 4, 4, scale=0.2),
    "shape": np.array([1, 8, 6]),
    **{f"w{name}": W(8, 8, seed=i, scale=0.3) for i, name in enumerate("qkvo")},
}
SHAPE = (1, 3, 8, 12)
IMAGES = [W(*SHAPE, seed=i) for i in range(12)]


@pytest.fixture(autouse=True)
def _whatever_they_cost(monkeypatch):
    monkeypatch.setattr(scores, "COST_DB", 100.0)


def quantized(folder, scheme=SCHEME, options=None):
    path, out = TEXT["write"](folder / "fp32.onnx", BODY, x=SHAPE, **ARRAYS), folder / f"{scheme.name}.onnx"
    seen = recipe.calibrate(path, folder, schemes=[PLAIN, scheme], images=IMAGES)
    options = options or QuantOptions()
    return path, out, recipe.quantize(seen, out, scheme=scheme, images=IMAGES, options=options)


def said(made):
    (line,) = [line for line in made.recipe if line.startswith("queries x keys")]
    return line


def zero_points(out):
    """Return dtype and value of the zero points of what the product `g` reads."""
    graph = ir.load(out).graph
    product = next(node for node in graph if node.name == "g")
    pairs = [value.producer() for value in product.inputs]
    zeros = [pair.inputs[2].const_value.numpy() for pair in pairs if pair.op_type == "DequantizeLinear"]
    return [(zero.dtype, int(zero)) for zero in zeros]


def test_they_are_signed_without_a_zero_point_and_the_patches_are_not(tmp_path):
    _, out, made = quantized(tmp_path)

    assert zero_points(out) == [(np.int8, 0)] * 2
    kinds = {n.inputs[2].const_value.dtype for n in ir.load(out).graph if n.op_type == "QuantizeLinear"}
    assert kinds == {ir.DataType.UINT8, ir.DataType.INT8}
    assert said(made).endswith("dB: kept")
    check.check_legal(out, SCHEME)
    assert made.skipped == (("m", "multiplies two activations (attention)"),)
    assert made.coverage == pytest.approx(
        1 - 2 * 6 * 6 * 8 / (8 * 48 * 6 + 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8)
    )  # of weights


def test_what_costs_too_much_stays_in_float(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "COST_DB", -100.0)

    _, out, made = quantized(tmp_path)

    assert zero_points(out) == []
    assert said(made).endswith("dB: dropped")
    assert made.skipped == (
        ("e", "patch embedding"),
        ("g", "multiplies two activations (attention)"),
        ("m", "multiplies two activations (attention)"),
    )


@pytest.mark.parametrize(
    ("scheme", "options"),
    [(PLAIN, QuantOptions()), (SCHEME, QuantOptions(keep_float=("g",)))],
    ids=["another runtime", "left in float"],
)
def test_nothing_is_tried_where_there_is_nothing_to_try(scheme, options, tmp_path):
    _, out, made = quantized(tmp_path, scheme, options)

    assert zero_points(out) == []
    assert not any("queries" in line for line in made.recipe)


def test_a_calibrator_that_was_asked_for_is_theirs_too(tmp_path):
    _, out, made = quantized(tmp_path, options=QuantOptions(calibrator="minmax"))

    assert zero_points(out) == [(np.int8, 0)] * 2
    assert made.calibrator == "minmax"


def test_another_runtime_shares_what_was_chosen_before_them(tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", BODY, x=SHAPE, **ARRAYS)
    seen, pinned = recipe.calibrate(path, tmp_path, schemes=[SCHEME, PLAIN], images=IMAGES), recipe.Pinned()
    made = {}
    for scheme in (SCHEME, PLAIN):
        facts = {"scheme": scheme, "images": IMAGES, "options": QuantOptions(), "pinned": pinned}
        made[scheme.name] = recipe.quantize(seen, tmp_path / f"{scheme.name}.onnx", **facts)

    assert len(zero_points(tmp_path / "s.onnx")) == 2
    assert zero_points(tmp_path / "plain.onnx") == []
    first, second = made["s"].recipe, made["plain"].recipe
    assert [line for line in first if not line.startswith("queries")] == list(second)


def test_what_was_decided_holds_for_the_graphs_with_layers_in_float(tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", BODY, x=SHAPE, **ARRAYS)
    seen, pinned = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=IMAGES), recipe.Pinned()
    facts = {"scheme": SCHEME, "images": IMAGES, "pinned": pinned}
    first = recipe.quantize(seen, tmp_path / "int8.onnx", options=QuantOptions(), **facts)
    again = recipe.quantize(seen, tmp_path / "int8.onnx", options=QuantOptions(keep_float=("q",)), **facts)

    assert zero_points(tmp_path / "int8.onnx") == [(np.int8, 0)] * 2
    assert again.calibrator == first.calibrator == pinned.widened
    assert said(again) == said(first)
    assert ("q", "kept in float on request") in again.skipped


def test_they_can_fall_back_to_float(tmp_path, monkeypatch):
    path, out, _ = quantized(tmp_path)

    ranked = {one.layer: one for one in sensitivity.rank(path, out, SCHEME, IMAGES)}

    assert ranked["g"].noise > 0
    assert ranked["g"].macs > 0
    monkeypatch.setattr(scores, "COST_DB", -100.0)
    path, out, _ = quantized(tmp_path)
    assert "g" not in {one.layer for one in sensitivity.rank(path, out, SCHEME, IMAGES)}


def test_a_recipe_that_quantizes_products_signs_what_goes_below_zero(tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", BODY, x=SHAPE, **ARRAYS)
    seen = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=IMAGES, recipe="attention")
    out = tmp_path / "int8.onnx"
    recipe.quantize(seen, out, scheme=SCHEME, images=IMAGES, options=QuantOptions(recipe="attention"))

    assert zero_points(out) == [(np.int8, 0)] * 2
    graph = ir.load(out).graph
    mix = next(node for node in graph if node.name == "m")
    zeros = [value.producer().inputs[2].const_value.numpy() for value in mix.inputs]
    assert [(zero.dtype, int(zero)) for zero in zeros] == [(np.uint8, 0), (np.int8, 0)]  # probabilities, values
    check.check_legal(out, SCHEME)
