"""Adaptive rounding block by block: what it learns on small networks, and what it leaves alone."""

import dataclasses
import logging
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")
pytest.importorskip("torch", reason="adaptive rounding needs torch")

import onnx_ir as ir  # noqa: E402

from rdeploy.errors import MissingDependency  # noqa: E402
from rdeploy.quantize import check, qdq, recipe  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.quantize.ranges import find_ranges  # noqa: E402
from rdeploy.quantize.repair import adaptive_rounding, error_feedback, rounded_block  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
OPS = ("Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool")
AFFINE = QuantScheme(name="affine", activations="uint8", ops=OPS, output_ops=("Conv",), weight_max=7)
SYMMETRIC = QuantScheme(name="symmetric", activations="int8", ops=OPS, residual="branch", weight_max=7)

NET = """
    a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, u) s = Add(c, r) t = Relu(s)
    d = Conv(t, v) p = GlobalAveragePool(d) f = Flatten(p) m = MatMul(f, k) y = Add(m, e)
"""
ARRAYS = {
    "w": W(8, 3, 3, 3, scale=0.3), "b": W(8, seed=1, scale=0.1), "u": W(8, 8, 3, 3, seed=2, scale=0.15),
    "v": W(12, 8, 1, 1, seed=3, scale=0.4), "k": W(12, 5, seed=4), "e": W(5, seed=5),
}  # fmt: skip
IMAGES = [W(1, 3, 8, 8, seed=i) for i in range(24)]
FRESH = [W(1, 3, 8, 8, seed=100 + i) for i in range(12)]


@dataclasses.dataclass
class Case:
    path: Path
    scheme: QuantScheme
    ranges: dict

    def start(self, model, placement):
        return qdq.quantize_weights(model.graph, placement, self.scheme, {})

    def learned(self, images=IMAGES, start=None):
        return adaptive_rounding.solve(self.path, self.ranges, self.scheme, images, start or self.start)

    def error(self, found=None):
        """Return the mean squared error of the network on fresh images, with what was found or what it started from."""
        out = self.path.with_name("out.onnx")
        model = ir.load(self.path)
        placement = place(model, self.scheme)
        weights = self.start(model, placement)
        if found is not None:
            weights = error_feedback.apply(model, placement, found)
        qdq.insert(model, placement, self.ranges, self.scheme, weights)
        ir.save(model, out)
        check.check_legal(out, self.scheme)
        return np.mean([np.square(TEXT["run"](self.path, i) - TEXT["run"](out, i)).mean() for i in FRESH])


def case(folder, scheme=AFFINE, body=NET, arrays=ARRAYS):
    path = TEXT["write"](folder / "fp32.onnx", body, **arrays)
    shared = place(ir.load(path), scheme).shared
    seen = recipe.observe_for(path, [scheme], IMAGES)
    symmetric = scheme.activations == "int8"
    return Case(path, scheme, find_ranges(seen, calibrator="minmax", options=None, symmetric=symmetric, shared=shared))


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda scheme: scheme.name)
def test_the_network_comes_closer_on_images_that_were_not_learned_on(scheme, tmp_path):
    one = case(tmp_path, scheme)

    found = one.learned()

    assert found.solved >= 2
    assert one.error(found) < 0.6 * one.error()


def test_scales_stay_and_integers_stay_within_their_bits(tmp_path):
    one = case(tmp_path)
    model = ir.load(one.path)
    start = one.start(model, place(model, AFFINE))

    found = one.learned()

    assert set(found.weights) == set(start)
    for name, (values, scales) in found.weights.items():
        assert values.dtype == np.int8
        assert np.abs(values).max() <= 7
        assert np.array_equal(scales, start[name][1])
    assert any(not np.array_equal(found.weights[name][0], start[name][0]) for name in start)


def test_what_is_learned_is_the_same_every_time(tmp_path):
    one = case(tmp_path)

    first, second = one.learned(), one.learned()

    assert all(np.array_equal(first.weights[name][0], second.weights[name][0]) for name in first.weights)
    assert all(np.array_equal(first.shifts[name], second.shifts[name]) for name in first.shifts)


def test_a_block_with_an_operator_without_gradient_keeps_its_integers(tmp_path, caplog):
    body = NET.replace("t = Relu(s)", "h = Relu(s) t = Celu(h)")
    one = case(tmp_path, body=body)
    model = ir.load(one.path)
    start = one.start(model, place(model, AFFINE))

    with caplog.at_level(logging.INFO):
        found = one.learned()

    assert np.array_equal(found.weights["u"][0], start["u"][0])
    assert any(not np.array_equal(found.weights[name][0], start[name][0]) for name in ("v", "k"))
    assert "integers are kept in front of t: layer 't' (Celu) has no gradient in rdeploy" in caplog.text


def test_what_was_learned_is_dropped_where_the_error_does_not_fall_on_held_out_images(tmp_path, monkeypatch):
    """Three images in four ask for the opposite of what the network does."""
    learn = rounded_block.learn

    def misled(block, images, read):
        return learn(block, images, lambda i: (read(i)[0], [t if i % 4 == 0 else -t for t in read(i)[1]]))

    monkeypatch.setattr(rounded_block, "learn", misled)
    one = case(tmp_path)
    model = ir.load(one.path)
    start = one.start(model, place(model, AFFINE))

    found = one.learned()

    assert found.solved == 0
    assert found.shifts == {}
    assert all(np.array_equal(found.weights[name][0], start[name][0]) for name in start)


def test_layers_that_share_their_weights_keep_them(tmp_path):
    body = "a = Conv(x, w) b = Conv(a, w) c = Conv(b, v) y = Relu(c)"
    one = case(tmp_path, body=body, arrays={"w": W(3, 3, 1, 1), "v": W(4, 3, 1, 1, seed=1)})
    model = ir.load(one.path)
    start = one.start(model, place(model, AFFINE))

    found = one.learned()

    assert np.array_equal(found.weights["w"][0], start["w"][0])


def test_a_graph_whose_shapes_hold_a_batch_of_one_is_learned_image_by_image(tmp_path):
    body = NET.replace("f = Flatten(p)", "f = Reshape(p, shape)")
    one = case(tmp_path, body=body, arrays=ARRAYS | {"shape": np.array([1, 12])})

    found = one.learned()

    assert one.error(found) < 0.7 * one.error()


def test_one_image_is_enough(tmp_path):
    assert set(case(tmp_path).learned(IMAGES[:1]).weights) == {"w", "u", "v", "k"}


def test_without_torch_the_error_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rdeploy.quantize.repair.rounded_block", None)
    monkeypatch.delattr("rdeploy.quantize.repair.rounded_block", raising=False)

    with pytest.raises(MissingDependency, match=r"adaptive rounding needs torch.*rdeploy\[torch\]"):
        case(tmp_path).learned()
