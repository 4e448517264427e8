"""Rounding with error feedback against closed forms: what it keeps, what it gains, what it puts into the bias."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import qdq, rounding, spooled  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.quantize.ranges import find_ranges  # noqa: E402
from rdeploy.quantize.repair import error_feedback  # noqa: E402
from rdeploy.quantize.sampling import Sampler  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
INT4 = QuantScheme(name="w4", activations="int8", ops=("Conv", "MatMul", "Add"), weight_max=7)


def samples(count=4000, inputs=24, seed=0):
    """Correlated inputs: few directions hold most of the power."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(1, count, inputs)) * np.geomspace(1, 0.02, inputs)) @ rng.normal(
        size=(inputs, inputs)
    ) + 1.0


def moments(x):
    found = rounding.Moments.empty(x.shape[0], x.shape[2])
    for part in np.array_split(x, 2, axis=1):
        found.add(part)
    return found


def error(weight, x, values, scales, biased=True):
    """Mean squared error of the layer's output, relative to its power; a bias takes the mean error."""
    held = values[0] * scales[0][:, None]
    exact = x[0] @ weight[0].T
    off = x[0] @ held.T - exact
    return np.square(off - off.mean(axis=0) * biased).mean() / np.square(exact).mean()


def test_weights_that_are_integers_already_are_kept():
    x, weight = samples(), np.random.default_rng(1).integers(-7, 8, (1, 5, 24)).astype(np.float64)
    weight[:, :, 0] = 7

    values, scales = rounding.solve(weight * 0.5, moments(x), 7)

    assert np.array_equal(values, weight)
    assert scales == pytest.approx(np.full((1, 5), 0.5))


@pytest.mark.parametrize("weight_max", [1, 7, 127])
def test_feedback_has_less_output_error_than_rounding_to_nearest(weight_max):
    x, weight = samples(), W(1, 16, 24, seed=1).astype(np.float64)
    peak = np.abs(weight).max(axis=2) / weight_max
    nearest = np.clip(np.rint(weight / peak[:, :, None]), -weight_max, weight_max)

    values, scales = rounding.solve(weight, moments(x), weight_max)

    assert np.abs(values).max() <= weight_max
    fresh = samples(seed=0)[:, :1000]
    assert error(weight, fresh, values, scales) < 0.5 * error(weight, fresh, nearest, peak)


def test_a_layer_without_a_bias_takes_the_means_into_its_weights():
    x = samples() + 5
    weight = W(1, 6, 24, seed=1).astype(np.float64)

    values, scales = rounding.solve(weight, moments(x), 7, biased=False)

    assert error(weight, x, values, scales, biased=False) < 1e-3


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("y = Conv<pads=[1,0,2,1], strides=[2,1]>(x, w)", W(5, 3, 3, 2)),
        ("y = Conv<group=3, pads=[1,1,1,1], dilations=[2,2]>(x, w)", W(6, 1, 2, 2)),
        ("y = Conv(x, w)", W(4, 3, 1, 1)),
    ],
)
def test_samples_times_weights_are_what_the_convolution_computes(body, weight, tmp_path):
    image = W(1, 3, 8, 8)
    path = TEXT["write"](tmp_path / "conv.onnx", body, w=weight)
    node = next(iter(ir.load(path).graph))

    sampler = Sampler(node, images=1)
    seen = sampler(image, 0)

    rows = weight.reshape(sampler.groups, -1, sampler.inputs)
    found = np.concatenate(np.einsum("gsi,goi->gos", seen, rows))  # (outputs, places)
    assert np.allclose(found, TEXT["run"](path, image)[0].reshape(len(found), -1), atol=1e-5)


def test_the_same_places_are_sampled_of_both_networks():
    proto = TEXT["model"]("y = MatMul(x, w)", x=(1, 4096, 16), w=W(16, 4))
    sampler = Sampler(next(iter(ir.from_proto(proto).graph)), images=8)
    rows = np.arange(4096 * 16, dtype=np.float32).reshape(1, 4096, 16)

    first, second = sampler(rows, 3), sampler(rows * 2, 3)

    assert first.shape == (1, 128, 16)
    assert np.array_equal(first * 2, second)
    assert not np.array_equal(first, sampler(rows, 4))


NET = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv(r, u) s = Add(c, r) p = Flatten(s) m = MatMul(p, v) y = Add(m, d)"
ARRAYS = {
    "w": W(6, 3, 3, 3, scale=0.3), "b": W(6, seed=1), "u": W(6, 6, 1, 1, seed=2, scale=0.4),
    "v": W(384, 5, seed=3), "d": W(5, seed=4),
}  # fmt: skip


def test_a_network_in_four_bits_gets_closer_layer_by_layer(tmp_path):
    path = TEXT["write"](tmp_path / "fp32.onnx", NET, **ARRAYS)
    batches = [W(1, 3, 8, 8, seed=i) for i in range(40)]
    from rdeploy.quantize import recipe

    histograms = recipe.observe_for(path, [INT4], batches)
    placement = place(ir.load(path), INT4)
    ranges = find_ranges(histograms, calibrator="minmax", options=None, symmetric=True, shared=placement.shared)
    found = error_feedback.solve(path, ranges, INT4, batches)

    errors = []
    for repaired in (False, True):
        model = ir.load(path)
        placement = place(model, INT4)
        weights = error_feedback.apply(model, placement, found) if repaired else None
        qdq.insert(model, placement, ranges, INT4, weights)
        ir.save(model, tmp_path / "out.onnx")
        fresh = [W(1, 3, 8, 8, seed=100 + i) for i in range(10)]
        off = [TEXT["run"](path, b) - TEXT["run"](tmp_path / "out.onnx", b) for b in fresh]
        errors.append(np.square(off).sum())

    assert found.solved == 3
    assert set(found.weights) == {"w", "u", "v"}
    assert errors[1] < 0.8 * errors[0]


def int8_outputs(path, ranges, found, folder, batches):
    """Return what the network gives with the weights and biases that were found, in INT4 weights, and in float."""
    model = ir.load(path)
    placement = place(model, INT4)
    weights = error_feedback.apply(model, placement, found) if found else None
    qdq.insert(model, placement, ranges, INT4, weights)
    ir.save(model, folder / "out.onnx")
    return np.stack([[TEXT["run"](g, b) for b in batches] for g in (folder / "out.onnx", path)])


@pytest.mark.parametrize("rounding_by", ["nearest", "feedback"])
def test_every_layer_gets_the_mean_back_that_all_layers_before_it_took(rounding_by, tmp_path):
    """The layer's own mean error and what its inputs have become: behind the last layer the mean is that of FP32."""
    path = TEXT["write"](tmp_path / "fp32.onnx", NET, **ARRAYS)
    batches = [W(1, 3, 8, 8, seed=i) for i in range(3)]
    placement = place(ir.load(path), INT4)
    ranges = dict.fromkeys(placement.reads, (-90.0, 90.0))  # coarse steps
    nearest = qdq.quantize_weights(ir.load(path).graph, placement, INT4, {})

    found = error_feedback.solve(path, ranges, INT4, batches, nearest=nearest if rounding_by == "nearest" else None)

    (plain, exact), (repaired, _) = (int8_outputs(path, ranges, f, tmp_path, batches) for f in (None, found))
    assert np.abs((plain - exact).mean(axis=0)).max() > 0.1
    assert np.abs((repaired - exact).mean(axis=0)).max() < 1e-4
    if rounding_by == "nearest":
        assert found.solved == 0
        assert all(np.array_equal(found.weights[name][0], nearest[name][0]) for name in nearest)


def test_layers_that_cannot_be_sampled_are_rounded_to_nearest(tmp_path):
    body = "a = Conv(x, w) b = Conv(a, v) c = Conv(b, v) f = Flatten(c) y = MatMul(f, k)"
    arrays = {"w": W(3, 3, 1, 1), "v": W(3, 3, 1, 1, seed=1), "k": W(192, 4, seed=2)}
    path = TEXT["write"](tmp_path / "fp32.onnx", body, **arrays)
    batches = [W(1, 3, 8, 8, seed=i) for i in range(6)]
    from rdeploy.quantize import recipe

    placement = place(ir.load(path), INT4)
    ranges = find_ranges(recipe.observe_for(path, [INT4], batches), calibrator="minmax", options=None, symmetric=True)
    found = error_feedback.solve(path, ranges, INT4, batches)

    assert placement.weights
    assert found.solved == 2  # not the two that share their weights
    expected, _ = qdq.quantize_weight(arrays["v"], 0, 7)
    assert np.array_equal(found.weights["v"][0], expected)


def test_states_from_a_file_give_the_same_integers(tmp_path, monkeypatch):
    path = TEXT["write"](tmp_path / "fp32.onnx", NET, **ARRAYS)
    batches = [W(1, 3, 8, 8, seed=i) for i in range(6)]
    ranges = dict.fromkeys(place(ir.load(path), INT4).reads, (-20.0, 20.0))
    found = []
    for in_memory in (1 << 30, 1):
        monkeypatch.setattr(spooled, "IN_MEMORY_BYTES", in_memory)
        found.append(error_feedback.solve(path, ranges, INT4, batches))

    kept, read = found
    assert all(np.array_equal(kept.weights[name][0], read.weights[name][0]) for name in ("w", "u", "v"))
    assert all(np.array_equal(kept.shifts[name], read.shifts[name]) for name in kept.shifts)
