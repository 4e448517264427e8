"""Analytic bias correction against integrals in float64, and on a network whose activations are the Gaussians it assumes."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import qdq  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.quantize.repair import analytic_bias, bias_correction  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
AFFINE = QuantScheme(name="affine", activations="uint8", ops=("Conv", "Gemm", "MatMul"), activation_bits=4)
SYMMETRIC = QuantScheme(name="symmetric", activations="int8", ops=("Conv", "Gemm", "MatMul"), weight_max=7)
MEANS, DEVIATIONS = np.array([-1.5, 0.0, 0.3, 4.0]), np.array([0.5, 2.0, 1.0, 3.0])
CLIPS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)]


def integral(function, kinks):
    """Integrate function(z) p(z) for every Gaussian, piece by piece between its kinks, with Simpson's rule."""
    total = np.zeros(len(MEANS))
    for row, (mean, deviation) in enumerate(zip(MEANS, DEVIATIONS)):
        ends = [mean - 12 * deviation, mean + 12 * deviation]
        edges = sorted({*ends, *(k for k in kinks if ends[0] < k < ends[1])})
        for a, b in zip(edges, edges[1:]):
            z = np.linspace(a, b, 2001)
            inside = np.clip(z, a + 1e-9 * (b - a), b - 1e-9 * (b - a))  # the function may jump at a kink
            values = (
                function(inside) * np.exp(-0.5 * ((z - mean) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
            )
            total[row] += (b - a) / 6000 * (values[0] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum() + values[-1])
    return total


@pytest.mark.parametrize("clip", CLIPS)
def test_the_mean_of_a_clipped_gaussian_is_its_integral(clip):
    found = analytic_bias.mean_of(MEANS, DEVIATIONS, clip)

    assert found == pytest.approx(integral(lambda z: np.clip(z, *clip), clip), abs=1e-8)


def test_the_mean_behind_a_relu_is_the_textbook_formula():
    found = analytic_bias.mean_of(np.array([0.0]), np.array([1.0]), (0.0, math.inf))

    assert found == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-15)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("scheme", "span"), [(AFFINE, (0.0, 3.0)), (AFFINE, (-0.7, 1.3)), (SYMMETRIC, (-2.0, 2.0))])
def test_the_mean_of_a_rounded_gaussian_is_its_integral(scheme, span, clip):
    scale, _, low, high = qdq.grid(span, scheme)
    thresholds = [(integer + 0.5) * float(scale) for integer in range(low, high)]

    def rounded(z):
        return np.clip(np.rint(np.clip(z, *clip) / float(scale)), low, high) * float(scale)

    found = analytic_bias.rounded_mean(MEANS, DEVIATIONS, clip, span, scheme)

    assert found == pytest.approx(integral(rounded, [*thresholds, *clip]), abs=1e-6)


def gaussian_image(channels, side=100):
    """An image whose values are the quantiles of a Gaussian in every channel, in another order in each."""
    from statistics import NormalDist

    values = np.array([NormalDist().inv_cdf((i + 0.5) / side**2) for i in range(side**2)])
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(values).reshape(side, side) for _ in range(channels)])[None].astype(np.float32)


@pytest.mark.parametrize("scheme", [AFFINE, SYMMETRIC], ids=lambda s: s.name)
def test_where_the_model_holds_the_mean_error_of_the_network_goes(scheme, tmp_path):
    """Each channel of the first layer is a Gaussian of its own; a ReLU6 clips it, four bits round it."""
    body = "a = Conv<group=3>(x, w, b) r = Clip(a, zero, six) y = Conv(r, v, d)"
    arrays = {
        "w": np.array([1.0, 2.0, 0.7], np.float32).reshape(3, 1, 1, 1), "b": np.array([-0.5, 1.0, 2.0], np.float32),
        "v": W(5, 3, 1, 1), "d": W(5), "zero": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    image = gaussian_image(3)
    path = TEXT["write"](tmp_path / "fp32.onnx", body, x=image.shape, **arrays)
    kept = next(node.name for node in ir.load(path).graph)
    ranges = {"r": (0.0, 4.0) if scheme.activations == "uint8" else (-4.0, 4.0)}

    outputs = [TEXT["run"](path, image)]
    for correct in (False, True):
        model = ir.load(path)
        placement = place(model, scheme, keep_float=[kept])
        weights = qdq.quantize_weights(model.graph, placement, scheme, {})
        if correct:
            shifts = analytic_bias.observe_shifts(path, ranges, scheme, [image], weights, keep_float=[kept])
            bias_correction.apply(model, placement, shifts)
        qdq.insert(model, placement, ranges, scheme, weights)
        ir.save(model, tmp_path / "int8.onnx")
        outputs.append(TEXT["run"](tmp_path / "int8.onnx", image))

    plain, corrected = (np.abs((found - outputs[0]).mean(axis=(0, 2, 3))).max() for found in outputs[1:])
    assert plain > 0.05
    assert corrected < 1e-3


def test_a_layer_behind_something_that_is_no_gaussian_is_left_alone(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "a = Sigmoid(x) y = Conv(a, w)", x=(1, 2, 4, 4), w=W(3, 2, 1, 1))

    model = ir.load(path)
    weights = qdq.quantize_weights(model.graph, place(model, AFFINE), AFFINE, {})

    assert analytic_bias.observe_shifts(path, {"a": (0.0, 1.0)}, AFFINE, [W(1, 2, 4, 4)], weights) == {}
