"""A patch embedding as a product of matrices: the same numbers, and integers that put out float."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import patches, recipe  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
PATCHES = "strides=[4,2], kernel_shape=[4,2]"
TOKENS = "r = Reshape(e, flat) t = Transpose<perm=[0,2,1]>(r) "
ATTENTION = (
    "k = Transpose<perm=[0,2,1]>(t) s = MatMul(t, k) p = Softmax<axis=-1>(s) v = MatMul(p, t) y = MatMul(v, last)"
)


def network(folder, attributes=PATCHES, bias="e"):
    embed = f"e = Conv<{attributes}>(x, w{', b' if bias else ''}) "
    constants = {"w": W(6, 3, 4, 2), "b": W(6), "flat": np.array([1, 6, -1], np.int64), "last": W(6, 5)}
    return TEXT["write"](folder / "m.onnx", embed + TOKENS + ATTENTION, x=(1, 3, 8, 8), **constants)


@pytest.mark.parametrize("bias", ["e", ""])
def test_the_numbers_are_the_same(bias, tmp_path):
    path = network(tmp_path, bias=bias)

    assert patches.rewrite(path, tmp_path / "p.onnx") == 1

    image = W(1, 3, 8, 8, seed=2)
    for name in ("e", "y"):
        before, after = (_all(p, tmp_path)[name](image) for p in (path, tmp_path / "p.onnx"))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    written = ir.load(tmp_path / "p.onnx")
    assert "Conv" not in [node.op_type for node in written.graph]
    assert [node.op_type for node in written.graph if node.name == "e"] == ["MatMul"]


def _all(path, folder):
    """Return how to compute each tensor of a graph."""

    def of(name):
        def run(image):
            model = ir.load(path)
            value = next(v for node in model.graph for v in node.outputs if v.name == name)
            model.graph.outputs.clear()
            model.graph.outputs.append(value)
            ir.save(model, folder / "one.onnx")
            return TEXT["run"](folder / "one.onnx", image)

        return run

    return {name: of(name) for name in ("e", "y")}


@pytest.mark.parametrize(
    "attributes",
    ["strides=[4,2], kernel_shape=[4,2], pads=[0,1,0,1]", "strides=[2,2], kernel_shape=[4,2]"],
)
def test_a_convolution_that_reads_pixels_twice_or_pads_is_left_alone(attributes, tmp_path):
    path = network(tmp_path, attributes)

    assert patches.rewrite(path, tmp_path / "p.onnx") == 0
    assert not (tmp_path / "p.onnx").exists()


def test_only_where_an_integer_convolution_writes_integers_and_the_recipe_asks(tmp_path):
    """The embedding is then in INT8, and what it puts out is not."""
    path = network(tmp_path)
    images = [W(1, 3, 8, 8, seed=i) for i in range(8)]
    scheme = QuantScheme(name="s", activations="uint8", ops=("Conv", "MatMul"), output_ops=("Conv",))
    kinds = {}
    for name, one in (("scores", scheme), ("vit", scheme), ("float", dataclasses.replace(scheme, output_ops=()))):
        seen = recipe.calibrate(
            path, tmp_path, schemes=[one], images=images, recipe="scores" if name == "float" else name
        )
        recipe.quantize(seen, tmp_path / "q.onnx", scheme=one, images=images, options=QuantOptions())
        graph = ir.load(tmp_path / "q.onnx").graph
        node = next(node for node in graph if node.name == "e")
        behind = [user.op_type for user, _ in node.outputs[0].uses()]
        kinds[name] = node.op_type, node.inputs[0].producer() is not None, behind

    assert kinds["scores"] == ("MatMul", True, ["Add"])
    assert kinds["vit"] == ("Conv", False, ["Reshape"])
    assert kinds["float"] == ("Conv", True, ["Reshape"])
