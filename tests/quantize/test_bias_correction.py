"""After bias correction, the mean of every layer's output is what it was, on the images it was corrected on."""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import qdq  # noqa: E402
from rdeploy.quantize.placement import place  # noqa: E402
from rdeploy.quantize.repair import bias_correction  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SCHEMES = [
    QuantScheme(name="affine", activations="uint8", ops=("Conv", "Gemm", "MatMul"), activation_bits=3),
    QuantScheme(name="symmetric", activations="int8", ops=("Conv", "Gemm", "MatMul"), weight_max=15, activation_bits=4),
]


def images(*shape, count=3):
    """Images of uneven channels and of few small values: in few steps, most of them round down."""
    rng = np.random.default_rng(3)
    offsets = rng.uniform(0.2, 1.0, shape[1] if len(shape) in (2, 4) else shape[-1])
    offsets = offsets.reshape(-1, 1, 1) if len(shape) == 4 else offsets
    return [(rng.gamma(1.0, 1.0, shape) * offsets).astype(np.float32) for _ in range(count)]


def mean_errors(body, batches, folder, scheme, *, axis=1, **arrays):
    """Return the mean error per output channel (plain, corrected), and how many layers were corrected."""
    exact = TEXT["write"](folder / "fp32.onnx", body, x=batches[0].shape, **arrays)
    high = float(np.max(batches))
    low = 0.0 if scheme.activations == "uint8" else -high
    ranges = dict.fromkeys(place(ir.load(exact), scheme).reads, (low, high))
    outputs, corrected = [outputs_of(exact, batches)], 0
    for correct in (False, True):
        model = ir.load(exact)
        placement = place(model, scheme)
        weights = qdq.quantize_weights(model.graph, placement, scheme, {})
        if correct:
            shifts = bias_correction.observe_shifts(exact, ranges, scheme, batches, weights)
            corrected = bias_correction.apply(model, placement, shifts)
        qdq.insert(model, placement, ranges, scheme, weights)
        ir.save(model, folder / "int8.onnx")
        outputs.append(outputs_of(folder / "int8.onnx", batches))
    other = tuple(i for i in range(outputs[0].ndim) if i != axis % outputs[0].ndim)
    errors = [np.abs((rounded - outputs[0]).mean(axis=other)) for rounded in outputs[1:]]
    return errors[0].max(), errors[1].max(), corrected


def outputs_of(path, batches):
    return np.concatenate([TEXT["run"](path, batch) for batch in batches]).astype(np.float64)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("", (5, 4, 3, 3)),
        ("<pads=[1,1,1,1]>", (5, 4, 3, 3)),
        ("<pads=[2,2,2,2]>", (5, 4, 5, 5)),
        ("<pads=[0,0,1,1], strides=[2,2]>", (5, 4, 3, 3)),
        ("<pads=[2,2,2,2], dilations=[2,2]>", (5, 4, 3, 3)),
        ("<pads=[1,1,1,1], group=4>", (4, 1, 3, 3)),
        ("<pads=[1,1,1,1], group=2>", (6, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_of_a_convolution_is_restored(bias, attributes, shape, scheme, tmp_path):
    batches = images(1, 4, 7, 7)
    arrays = {"w": W(*shape), **({"b": W(shape[0])} if bias else {})}

    plain, corrected, count = mean_errors(
        f"y = Conv{attributes}(x, w{', b' if bias else ''})", batches, tmp_path, scheme, **arrays
    )

    assert count == 1
    assert plain > 0.01
    assert corrected < 1e-5 * max(plain, 1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("<pads=[1,1,1,1]>", (5, 4, 3, 3)),
        ("<pads=[0,2,1,3], strides=[2,3]>", (5, 4, 2, 5)),
        ("<pads=[4,4,4,4], dilations=[4,4], group=2>", (6, 2, 3, 3)),
        ("<pads=[9,9,9,9], strides=[5,5]>", (5, 4, 1, 1)),
    ],
)
def test_the_mean_is_restored_on_images_whose_borders_differ(attributes, shape, scheme, tmp_path):
    plain, corrected, _ = mean_errors(
        f"y = Conv{attributes}(x, w, b)", images(1, 4, 12, 12), tmp_path, scheme, w=W(*shape), b=W(shape[0])
    )

    assert corrected < 1e-5 < 0.01 < plain


def test_a_convolution_without_padding_over_single_pixels_is_exact_on_any_image(tmp_path):
    plain, corrected, _ = mean_errors("y = Conv(x, w)", images(1, 4, 9, 9), tmp_path, SCHEMES[0], w=W(5, 4, 1, 1))

    assert corrected < 1e-5 < 0.01 < plain


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = Gemm<transB=1>(x, w, b)", (5, 8)),
        ("y = Gemm<transB=1>(x, w)", (5, 8)),
        ("y = Gemm(x, w, b)", (8, 5)),
        ("m = MatMul(x, w) y = Add(m, b)", (8, 5)),
        ("m = MatMul(x, w) y = Add(b, m)", (8, 5)),
    ],
)
def test_the_mean_of_a_linear_layer_is_restored(body, shape, scheme, tmp_path):
    arrays = {"w": W(*shape), **({"b": W(5)} if "b)" in body or "(b" in body else {})}

    plain, corrected, count = mean_errors(body, images(1, 8), tmp_path, scheme, **arrays)

    assert count == 1
    assert corrected < 1e-5 < 0.01 < plain


def test_the_channels_of_tokens_are_the_last_axis(tmp_path):
    body = "m = MatMul(x, w) y = Add(m, b)"

    plain, corrected, _ = mean_errors(body, images(1, 6, 8), tmp_path, SCHEMES[0], axis=-1, w=W(8, 5), b=W(5))

    assert corrected < 1e-5 < 0.01 < plain


@pytest.mark.parametrize(
    "body", ["y = MatMul(x, w)", "m = MatMul(x, w) y = Mul(m, b)", "m = MatMul(x, w) y = Add(m, x)"]
)
def test_a_matmul_without_a_bias_is_left_alone(body, tmp_path):
    arrays = {"b": W(8)} if "b)" in body else {}
    plain, corrected, count = mean_errors(body, images(1, 8), tmp_path, SCHEMES[0], w=W(8, 8), **arrays)

    assert count == 0
    assert corrected == plain > 0


def test_a_bias_that_two_layers_share_is_corrected_for_each(tmp_path):
    body = "a = Conv(x, w, b) y = Conv(x, v, b) z = Concat<axis=1>(a, y)"
    plain, corrected, count = mean_errors(
        body, images(1, 4, 5, 5), tmp_path, SCHEMES[0], w=W(3, 4, 1, 1), v=W(3, 4, 1, 1, seed=1), b=W(3), outputs=("z",)
    )

    assert count == 2
    assert corrected < 1e-5 < 0.01 < plain


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_rounding_in_float_is_what_a_pair_does(scheme, tmp_path):
    body = "q = QuantizeLinear(x, step, zero) y = DequantizeLinear(q, step, zero)"
    span = (-0.7, 1.3)
    scheme = dataclasses.replace(scheme, activation_bits=8)
    step, zero = qdq.scale_and_zero_point(span, scheme.activations)
    values = np.random.default_rng(0).uniform(-2, 2, (1, 1000)).astype(np.float32)
    path = TEXT["write"](tmp_path / "q.onnx", body, x=(1, 1000), step=np.asarray(step), zero=np.asarray(zero))

    rounded = bias_correction.fake_quantize(values, span, scheme)

    np.testing.assert_allclose(rounded, TEXT["run"](path, values), atol=1e-6)


def test_there_is_a_shift_for_every_image(tmp_path):
    batches, scheme = images(1, 4, 3, 3), QuantScheme(name="a", activations="uint8", ops=("Conv",))
    path = TEXT["write"](tmp_path / "m.onnx", "y = Conv(x, w)", x=(1, 4, 3, 3), w=W(2, 4, 1, 1))
    model = ir.load(path)
    weights = qdq.quantize_weights(model.graph, place(model, scheme), scheme, {})

    shifts = bias_correction.observe_shifts(path, {"x": (0.0, 1.0)}, scheme, batches, weights)

    (values, scales), held = weights["w"], np.concatenate(batches).clip(0, 1)
    moved = (values * scales.reshape(-1, 1, 1, 1))[:, :, 0, 0] @ np.rint(held * 255).mean((2, 3)).T / 255
    moved -= W(2, 4, 1, 1)[:, :, 0, 0] @ held.mean((2, 3)).T
    assert set(shifts) == {"y"}
    np.testing.assert_allclose(shifts["y"], moved.T, atol=1e-5)


def test_a_tap_that_reads_nothing_but_padding_sees_zeros(tmp_path):
    path = TEXT["write"](
        tmp_path / "m.onnx",
        "y = Conv<pads=[0,0,3,0], strides=[9,1], dilations=[3,1]>(x, w)",
        x=(1, 1, 2, 1),
        w=W(1, 1, 2, 1),
    )
    (node,) = ir.load(path).graph

    assert bias_correction.mean_read(node, np.array([[[[5.0], [7.0]]]], np.float32)).reshape(-1) == pytest.approx(
        [5, 0]
    )


def test_an_image_that_is_unlike_the_others_does_not_move_the_biases(tmp_path):
    assert bias_correction.trimmed(np.array([[0.0]] * 7 + [[100.0]])) == pytest.approx([0.0])


def test_what_a_range_cuts_off_is_not_given_back(tmp_path):
    """One value of a hundred is cut from 100 to 1; the bias stays, where it would have to rise by 0.99."""
    image = np.full((1, 1, 10, 10), 1.0, np.float32)
    image[0, 0, 3, 3] = 100.0
    one = np.ones((1, 1, 1, 1))
    path = TEXT["write"](tmp_path / "m.onnx", "y = Conv(x, w)", x=image.shape, w=one.astype(np.float32))
    weights = {"w": (np.ones((1, 1, 1, 1), np.int8), np.ones(1, np.float32))}

    shifts = bias_correction.observe_shifts(path, {"x": (0.0, 1.0)}, SCHEMES[0], [image], weights)

    assert shifts["y"] == pytest.approx([0.0], abs=1e-6)
