"""What kind of network a graph is, by what is in it."""

import dataclasses
import runpy
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402

from rdeploy.errors import ConfigError  # noqa: E402
from rdeploy.quantize import families  # noqa: E402
from rdeploy.quantize.calibrators import names  # noqa: E402
from rdeploy.types import RECIPES, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]

SHAPES = {"tokens": np.array([1, 64, 3]), "windows": np.array([1, 2, 4, 2, 4, 3]), "flat": np.array([4, 16, 3])}
ATTEND = "q = MatMul(t, w) k = Transpose<perm=[0,2,1]>(q) s = MatMul(q, k) p = Softmax(s) o = MatMul(p, q)"
TAIL = "g = GlobalAveragePool(c) y = Flatten(g)"

GRAPHS = {
    "plain": (f"a = Conv(x, v) c = Conv(a, v) {TAIL}", {"v": W(3, 3, 1, 1)}),
    "depthwise": (f"a = Conv(x, v) c = Conv<group=3>(a, d) {TAIL}", {"v": W(3, 3, 1, 1), "d": W(3, 1, 3, 3)}),
    "dense": ("a = Conv(x, v) y = Conv(a, v)", {"v": W(3, 3, 1, 1)}),
    "vit": (f"t = Reshape(x, tokens) {ATTEND} y = Identity(o)", {"tokens": SHAPES["tokens"], "w": W(3, 3)}),
    "windowed": (
        f"r = Reshape(x, windows) m = Transpose<perm=[0,1,3,2,4,5]>(r) t = Reshape(m, flat) {ATTEND} y = Identity(o)",
        {"windows": SHAPES["windows"], "flat": SHAPES["flat"], "w": W(3, 3)},
    ),
    "hybrid": (
        f"a = Conv(x, v) b = Conv(a, v) c = Conv(b, v) t = Reshape(c, tokens) {ATTEND} y = Identity(o)",
        {"tokens": SHAPES["tokens"], "w": W(3, 3), "v": W(3, 3, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_family_is_read_from_the_operators(name):
    body, arrays = GRAPHS[name]
    graph = ir.from_proto(TEXT["model"](body, **arrays)).graph

    assert families.family(graph) == name
    assert families.find("auto", graph) == (name, families.RECIPES[name])


@pytest.mark.parametrize(("bent", "smooth"), [("Gelu", True), ("Erf", True), ("Relu", False)])
def test_linear_layers_behind_a_gelu_are_smoothed_whatever_the_family(bent, smooth):
    """ConvNeXt: depthwise by its convolutions, Linear layers and GELU in its blocks."""
    body = f"""c = Conv<group=3, pads=[1,1,1,1]>(x, d) t = Transpose<perm=[0,2,3,1]>(c) n = MatMul(t, w) e = {bent}(n)
               m = MatMul(e, w) s = ReduceMean<keepdims=0>(m, axes) y = Identity(s)"""
    arrays = {"d": W(3, 1, 3, 3), "w": W(3, 3), "axes": np.array([1, 2])}

    name, steps = families.find("auto", ir.from_proto(TEXT["model"](body, opset=20, **arrays)).graph)

    assert (name, steps.smooth) == ("depthwise", smooth)
    assert families.find("fast", ir.from_proto(TEXT["model"](body, opset=20, **arrays)).graph)[1].smooth is False


def test_a_recipe_that_was_asked_for_is_the_one():
    graph = ir.from_proto(TEXT["model"](GRAPHS["plain"][0], **GRAPHS["plain"][1])).graph

    assert families.find("thorough", graph) == ("thorough", families.RECIPES["thorough"])


def test_the_recipe_of_attention_quantizes_more_than_the_runtime_needs():
    scheme = QuantScheme(name="a", activations="uint8", ops=("MatMul",))

    for name, products in (("attention", "all"), ("scores", "scores")):
        assert families.scheme_for(name, scheme) == dataclasses.replace(scheme, products=products, patches=True)
    for other in ("auto", "vit", "thorough"):
        assert families.scheme_for(other, scheme) == scheme


def test_an_unknown_recipe_is_refused():
    graph = ir.from_proto(TEXT["model"](GRAPHS["plain"][0], **GRAPHS["plain"][1])).graph

    with pytest.raises(
        ConfigError, match=r"unknown recipe 'thorogh', did you mean 'thorough'\?; there are: auto, plain"
    ):
        families.find("thorogh", graph)


def test_the_options_names_are_the_recipes():
    assert set(RECIPES) == {"auto", *families.RECIPES}
    assert {c for recipe in families.RECIPES.values() for c in recipe.calibrators} <= set(names())
