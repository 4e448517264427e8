"""Smoothing: exact in FP32, only where nothing before it can take the factor, and only where it gains."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import recipe  # noqa: E402
from rdeploy.quantize.channels import SMOOTHED  # noqa: E402
from rdeploy.quantize.repair import smoothing  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
OPS = ("Conv", "Gemm", "MatMul", "Add")
SCHEMES = {
    kind: QuantScheme(name=kind, activations=kind, ops=OPS, residual="none", weight_max=127)
    for kind in ("int8", "uint8")
}
GELU = "h = MatMul(x, w) i = Add(h, b) d = Div(i, root) e = Erf(d) p = Add(e, one) m = Mul(i, p) g = Mul(m, half)"
NET = GELU + " k = MatMul(g, v) y = Add(k, c)"
ARRAYS = {
    "w": W(8, 32, scale=0.5) * np.geomspace(1, 20, 32).astype(np.float32), "b": W(32), "v": W(32, 6), "c": W(6),
    "root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
}  # fmt: skip


def images(count=24):
    return [W(1, 16, 8, seed=i) for i in range(count)]


def network(folder, body=NET, arrays=ARRAYS):
    return TEXT["write"](folder / "fp32.onnx", body, x=(1, 16, 8), **arrays)


def smoothed_nodes(path):
    return [node for node in ir.load(path).graph if (node.name or "").endswith((SMOOTHED, "::moved"))]


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_smoothed_network_is_the_same_in_float(kind, tmp_path):
    path, out = network(tmp_path), tmp_path / "smoothed.onnx"

    count = smoothing.smooth(path, out, [SCHEMES[kind]], images())

    assert count == 2  # the image, and what the GELU writes
    exact, found = (TEXT["run"](p, images()[3]) for p in (path, out))
    np.testing.assert_allclose(found, exact, atol=2e-4 * np.abs(exact).max())
    assert 2 <= len(smoothed_nodes(out)) <= 4


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.6), ("uint8", 0.9)])
def test_behind_a_gelu_it_gains_most_where_the_range_is_symmetric(kind, most, tmp_path):
    path, out = network(tmp_path), tmp_path / "int8.onnx"
    errors = {}
    for name in ("vit", "fast"):
        seen = recipe.calibrate(path, tmp_path, schemes=[SCHEMES[kind]], images=images(), recipe=name)
        made = recipe.quantize(
            seen, out, scheme=SCHEMES[kind], images=images(), options=QuantOptions(calibrator="minmax")
        )
        fresh = [W(1, 16, 8, seed=100 + i) for i in range(8)]
        errors[name] = np.square([TEXT["run"](path, x) - TEXT["run"](out, x) for x in fresh]).sum()
        kept = any("smoothing" in line and "kept" in line for line in made.recipe)
        assert kept == (name == "vit")

    assert errors["vit"] < most * errors["fast"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("r = Relu(x) k = MatMul(r, v) y = Mul(k, k)", "no bias takes the shift"),
        (GELU + " k = MatMul(g, v) n = Add(k, c) s = ReduceMean<keepdims=0>(g) y = Add(n, s)", "read elsewhere"),
        ("h = LayerNormalization(x, q) k = MatMul(h, v) y = Add(k, c)", "the LayerNormalization takes it"),
    ],
)
def test_it_is_left_out_where(body, why, tmp_path):
    arrays = {**ARRAYS, "v": W(32 if "GELU" in why or "g, v" in body else 8, 6), "q": np.ones(8, np.float32)}
    arrays = {name: array for name, array in arrays.items() if f", {name}" in body or f"({name}" in body}
    model = ir.load(network(tmp_path, body, arrays))
    model = ir.from_proto(ir.to_proto(model))

    inserted = smoothing.insert(model, [SCHEMES["int8"]])

    names = [node.name for node in model.graph if (node.name or "").endswith(SMOOTHED)]
    assert not any(name.startswith(("r", "g", "h:")) for name in names), why
    assert inserted == len(names)


def test_what_stays_neutral_is_taken_out_again(tmp_path):
    model = ir.load(network(tmp_path))
    before = [node.op_type for node in model.graph]

    inserted = smoothing.insert(model, [SCHEMES["uint8"]])

    assert inserted > 0
    assert smoothing.prune(model.graph) == 0
    assert [node.op_type for node in model.graph] == before


def test_what_is_only_the_second_summand_is_left_alone(tmp_path):
    """The sum of two convolutions, as in SegFormer's and ViTamin's: nothing reads the second one as its first input."""
    body = "a = Conv(x, w) b = Conv(x, v) s = Add(a, b) y = Conv(s, u)"
    arrays = {"w": W(4, 3, 1, 1), "v": W(4, 3, 1, 1), "u": W(2, 4, 1, 1)}
    model = ir.load(TEXT["write"](tmp_path / "fp32.onnx", body, x=(1, 3, 8, 8), **arrays))

    assert smoothing.insert(model, [replace(SCHEMES["uint8"], residual="all")]) == 0
