"""Whose error it is: the shares against what is measured when a layer is left in float."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import recipe, sensitivity  # noqa: E402
from rdeploy.quantize.adjoint.network import RULES  # noqa: E402
from rdeploy.quantize.ranges import float_outputs  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SCHEME = QuantScheme(name="s", activations="int8", ops=("Conv", "MatMul", "Add"), weight_max=63)
NET = """a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, u) s = Add(c, r) d = Conv(s, v)
         g = GlobalAveragePool(d) f = Flatten(g) y = MatMul(f, k)"""
ARRAYS = {
    "w": W(6, 3, 3, 3, seed=1),
    "b": W(6, seed=2),
    "u": W(6, 6, 3, 3, seed=3),
    "v": W(4, 6, 1, 1, seed=4),
    "k": W(4, 5, seed=5),
}
IMAGES = [W(1, 3, 8, 8, seed=i) for i in range(24)]


def quantized(folder, **options):
    path, out = folder / "fp32.onnx", folder / "int8.onnx"
    TEXT["write"](path, NET, **ARRAYS)
    seen = recipe.calibrate(path, folder, schemes=[SCHEME], images=IMAGES, recipe="fast")
    recipe.quantize(seen, out, scheme=SCHEME, images=IMAGES, options=QuantOptions(calibrator="minmax", **options))
    return path, out


def noise(path, out):
    """Return the mean square error at the output, Q/DQ pairs evaluated as they are written."""
    exact, rounded = (np.concatenate([row[0] for row in float_outputs(p, IMAGES)]) for p in (path, out))
    return float(np.square(exact - rounded).sum(axis=1).mean())


def test_what_falls_away_with_a_layer_is_its_own_reads_and_weights(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", NET, **ARRAYS)

    found = sensitivity.owned_sites(ir.load(path), SCHEME)

    assert found["a"] == ({("a", 0)}, {"a"})
    assert found["y"] == ({("y", 0)}, {"y"})
    assert found["s"] == ({("s", 0), ("s", 1)}, set())  # the residual sum
    assert ("c", 0) in found["c"][0]


def test_the_shares_add_up_and_the_first_layer_in_float_gains_more_than_the_last(tmp_path):
    path, out = quantized(tmp_path)
    full = noise(path, out)

    ranked = sensitivity.rank(path, out, SCHEME, IMAGES)

    assert sum(one.noise for one in ranked) == pytest.approx(1)
    assert [one.noise for one in ranked] == sorted((one.noise for one in ranked), reverse=True)
    assert {one.layer for one in ranked} == {"a", "c", "d", "y", "s"}
    gains = [1 - noise(*quantized(tmp_path, keep_float=(one.layer,))) / full for one in (ranked[0], ranked[-1])]
    assert gains[0] > 0.05
    assert gains[0] > gains[1]


def test_the_noise_that_is_predicted_is_the_noise_that_is_there(tmp_path):
    path, out = quantized(tmp_path)

    layers = sensitivity.owned_sites(ir.load(path), SCHEME)
    predicted = sum(sensitivity._noise(out, layers, IMAGES).values())

    assert predicted == pytest.approx(noise(path, out), rel=0.5)


def with_coarse_weights(tmp_path):
    """Return a network and its INT8 form, in which the weights `v`, of layer `d`, have a 32nd of their steps."""
    path, out = quantized(tmp_path)
    model = ir.load(out)
    scale, integers = (model.graph.initializers[name] for name in ("v_scale", "v_int8"))
    scale.const_value = ir.tensor(scale.const_value.numpy() * 32, name="v_scale")
    integers.const_value = ir.tensor((integers.const_value.numpy() // 32).astype(np.int8), name="v_int8")
    ir.save(model, out)
    return path, out


def test_the_layer_with_the_coarse_weights_is_the_first(tmp_path):
    path, out = with_coarse_weights(tmp_path)

    ranked = sensitivity.rank(path, out, SCHEME, IMAGES)

    assert ranked[0].layer == "d"
    assert ranked[0].noise > 0.8
    assert ranked[0].macs == pytest.approx(4 * 6 * 64 / (6 * 27 * 64 + 6 * 54 * 64 + 4 * 6 * 64 + 20))


def test_without_gradients_the_layers_rank_by_their_own_error(tmp_path, monkeypatch):
    path, out = with_coarse_weights(tmp_path)
    monkeypatch.delitem(RULES, "GlobalAveragePool")

    ranked = sensitivity.rank(path, out, SCHEME, IMAGES)

    assert ranked[0].layer == "d"
    assert sum(one.noise for one in ranked) == pytest.approx(1)
    assert {one.layer for one in ranked} == {"a", "c", "d", "y", "s"}
    assert all(one.noise > 0 for one in ranked)
