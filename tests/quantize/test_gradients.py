"""Values weighed by gradients against closed forms: what the output minds more counts more, and what it does not, not at all."""

import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="gradients need torch")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.quantize import differentiable, gradients, recipe  # noqa: E402
from rdeploy.quantize.calibrators import gradient  # noqa: E402
from rdeploy.quantize.histogram import Histogram  # noqa: E402
from rdeploy.quantize.operators.evaluation import OPERATORS  # noqa: E402
from rdeploy.quantize.ranges import find_ranges, observe  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SCHEME = QuantScheme(name="affine", activations="uint8", ops=("Conv", "MatMul", "Gemm"))


def test_a_value_counts_by_the_square_of_the_output_s_gradient(tmp_path):
    """y = 3 x0 + x1 + 0 x2: weights 9, 1 and 0."""
    path = TEXT["write"](
        tmp_path / "m.onnx", "r = Identity(x) y = MatMul(r, w)", x=(1, 3), w=np.float32([[3], [1], [0]])
    )
    batches = [np.float32([[0.5, -0.25, 1.0]])] * 4

    found = gradients.observe(path, observe(path, ["r"], batches), batches)["r"]

    centers, counts = found.filled()
    assert centers == pytest.approx([-0.25, 0.5], abs=2 / 4096)
    assert counts == pytest.approx([1 * 4 * gradients.PROBES, 9 * 4 * gradients.PROBES])
    assert (found.low, found.high) == (-0.25, 1.0)


def test_what_saturates_behind_it_does_not_count(tmp_path):
    body = "a = Identity(x) r = Clip(a, zero, six) y = ReduceSum<keepdims=0>(r)"
    path = TEXT["write"](tmp_path / "m.onnx", body, x=(1, 4), zero=np.float32(0), six=np.float32(6))
    batches = [np.float32([[-1.0, 2.0, 5.0, 9.0]])]

    found = gradients.observe(path, observe(path, ["a"], batches), batches)["a"]

    centers, counts = found.filled()
    assert centers == pytest.approx([2.0, 5.0], abs=18 / 4096)
    assert counts == pytest.approx([gradients.PROBES, gradients.PROBES])


def test_a_large_value_that_does_not_matter_does_not_widen_the_range(tmp_path):
    weight = np.ones((64, 4), np.float32)
    weight[0] = 0
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) y = MatMul(r, w)", x=(1, 64), w=weight)
    batches = [np.abs(W(1, 64, seed=i)) * np.where(np.arange(64) == 0, 50, 1).astype(np.float32) for i in range(20)]
    seen = observe(path, ["r"], batches)

    weighed = gradients.observe(path, seen, batches)
    _, high = find_ranges(weighed, calibrator="gradient", options=gradient.Options(), symmetric=False)["r"]

    assert seen["r"].high > 40
    assert high < 5


def test_what_is_clipped_together_is_felt_together(tmp_path):
    """A sum feels 256 values that are cut by as much each 256 times as much as one; alternating signs cancel it."""
    ranges = {}
    for name, signs in (("sum", np.ones(512)), ("alternating", np.tile([1.0, -1.0], 256))):
        weight = signs.astype(np.float32).reshape(512, 1)
        path = TEXT["write"](tmp_path / f"{name}.onnx", "r = Relu(x) y = MatMul(r, w)", x=(1, 512), w=weight)
        batches = [np.abs(W(1, 512, seed=i)) for i in range(20)]
        weighed = gradients.observe(path, observe(path, ["r"], batches), batches)
        options = gradient.Options(bits=3)
        ranges[name] = find_ranges(weighed, calibrator="gradient", options=options, symmetric=False)["r"]

    assert ranges["sum"][1] > 1.05 * ranges["alternating"][1]


def test_another_power_than_two_counts_values_one_by_one(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) y = MatMul(r, w)", x=(1, 64), w=np.ones((64, 1), np.float32))
    batches = [np.abs(W(1, 64, seed=i)) for i in range(20)]
    weighed = gradients.observe(path, observe(path, ["r"], batches), batches)

    found, alone = (
        find_ranges(weighed, calibrator=name, options=gradient.Options(power=4.0, bits=4), symmetric=False)["r"]
        for name in ("gradient", "mse")
    )

    assert found == alone


def test_small_networks_are_seen_on_more_images(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) y = Conv(r, w)", x=(1, 3, 8, 8), w=W(4, 3, 1, 1))
    batches = [W(1, 3, 8, 8, seed=i) for i in range(2 * gradients.IMAGES)]

    found = gradients.observe(path, observe(path, ["r"], batches), batches)["r"]

    assert len(found.felt) == len(batches) * gradients.PROBES


def test_without_gradients_the_channels_weigh(tmp_path, monkeypatch):
    """An operator that has none, or no torch: the recipe goes on, and the ranges are those of `mse`."""
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) y = Conv(r, w)", x=(1, 3, 8, 8), w=W(4, 3, 1, 1))
    batches = [W(1, 3, 8, 8, seed=i) for i in range(8)]

    def refuse(*given):
        raise Unsupported("no gradient of Foo", stage="quantize")

    monkeypatch.setattr(gradients, "Network", refuse)
    monkeypatch.setattr(differentiable, "Graph", refuse)
    made = {}
    for name in ("mse", "gradient"):
        seen = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=batches, recipe="fast")
        options = QuantOptions(calibrator=name)
        found = recipe.quantize(seen, tmp_path / name, scheme=SCHEME, images=batches, options=options)
        made[name] = TEXT["run"](tmp_path / name, batches[0])

    assert "gradient: values weighed by their channels only, since no gradient of Foo" in found.recipe
    assert np.array_equal(made["gradient"], made["mse"])


def test_what_cannot_be_evaluated_does_not_stop_int8_and_is_said(tmp_path, monkeypatch):
    path = TEXT["write"](
        tmp_path / "m.onnx", "c = Conv(x, v) r = Mish(c) y = Conv(r, v)", x=(1, 3, 8, 8), v=W(3, 3, 1, 1)
    )
    batches = [W(1, 3, 8, 8, seed=i) for i in range(8)]

    def broken(node, x):
        raise KeyError("wrap")

    monkeypatch.setitem(OPERATORS, "Mish", broken)
    seen = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=batches)
    found = recipe.quantize(seen, tmp_path / "o.onnx", scheme=SCHEME, images=batches, options=QuantOptions())

    said = "gradient: values weighed by their channels only, since layer 'r' (Mish) has no gradient in rdeploy: KeyError 'wrap'"
    assert said in found.recipe


def test_a_class_index_as_the_only_output_has_no_gradient(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "r = Relu(x) g = Greater(r, x) y = Cast<to=1>(g)", x=(1, 3, 8, 8))
    batches = [W(1, 3, 8, 8)]

    with pytest.raises(Unsupported, match="the network's output has no gradient"):
        gradients.observe(path, observe(path, ["r"], batches), batches)


def test_two_class_indices_have_no_gradient_either(tmp_path):
    body = "r = Relu(x) y = Greater(r, x) z = Greater(x, r)"
    model = TEXT["model"](body, outputs=("y", "z"), check=False)
    for output in model.graph.output:
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.BOOL, (1, 3, 8, 8)))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)

    with pytest.raises(Unsupported, match="the network's outputs have no gradient: all are integers"):
        gradients.observe(path, {}, [W(1, 3, 8, 8)])


def test_what_few_images_say_of_clipping_counts_by_the_upper_end_of_its_interval():
    """Clipping is felt by one image of four as 1, by the others not at all: mean 1/4, deviation sqrt(3)/4, skewness 2/sqrt(3)."""
    squares = np.repeat([1.0, 0.0, 0.0, 0.0], gradients.PROBES)

    skewed = 2 / np.sqrt(3) * 19 / (6 * 2)
    assert gradient._upper(squares) == pytest.approx(0.25 + (3 + skewed) * np.sqrt(3) / 4 / 2)
    assert gradient._upper(np.ones(8)) == 1  # all images alike: there is nothing to be unsure of


@pytest.mark.parametrize("peak", np.float32([6.0, 9.262608, 7.3076558, 0.1, 3.3333333]))
def test_zeros_and_values_at_the_end_are_cut_by_no_range_that_holds_them(peak):
    """Behind a ReLU6 they are most of a tensor: a bin that takes zero to be below it costs as much as all of them feel."""
    seen = Histogram()
    values = np.float32([0.0] * 1000 + [0.3 * peak, peak])
    seen.update(values)
    seen.feel(values, np.full(values.size, 1e3, np.float32))

    cut = seen.felt[0] @ gradient._cut(seen.coarse_centers, (0.0, float(peak)))

    assert cut == 0


def test_what_gradients_did_not_see_and_the_histogram_did_is_not_cut_for_nothing():
    """The largest values were in images whose gradients are not known."""
    wide, narrow = Histogram(), Histogram()
    images = [np.append(np.abs(W(256, seed=i)), 3.0 + 0.05 * i).astype(np.float32) for i in range(12)]
    for image in images:
        narrow.update(image)
        wide.update(image)
    for _ in range(84):
        narrow.update(images[-1])
        wide.update(images[-1])
    wide.update(np.append(images[-1], np.float32(8.0)))
    for histogram in (wide, narrow):
        for image in images:
            for _ in range(gradients.PROBES):
                histogram.feel(image, np.where(image > 2.9, 30.0, 1.0).astype(np.float32))

    ends = [gradient.find_range(histogram, gradient.Options(), symmetric=False)[1] for histogram in (wide, narrow)]

    assert ends[0] > 1.2 * ends[1]


def test_two_directions_of_an_image_are_one_image():
    """They clip the same values: what differs between them says nothing of other images."""
    images = np.array([4.0, 1.0, 0.0, 2.0, 3.0])

    mixed = np.stack([images - 0.5, images + 0.5], axis=1).reshape(-1)
    assert gradient._upper(mixed) == pytest.approx(gradient._upper(np.repeat(images, gradients.PROBES)))


def test_a_range_that_few_images_ask_to_clip_is_wider_than_one_that_all_do(monkeypatch):
    values = np.concatenate([W(1 << 12), np.float32([8.0] * 4)])
    seen = Histogram()
    for _ in range(100):
        seen.update(values)
    for index in range(8):
        seen.feel(values, np.where(values > 7, 0.4 * (index == 0), 1.0).astype(np.float32))
    options = gradient.Options()

    wide = gradient.find_range(seen, options, symmetric=True)
    monkeypatch.setattr(gradient, "_ERRORS", 0.0)
    narrow = gradient.find_range(seen, options, symmetric=True)

    assert wide[1] > 1.02 * narrow[1]


@pytest.mark.parametrize(("limit", "further"), [(np.inf, True), (4.0, False)])
def test_a_range_is_wider_than_what_was_seen_unless_values_end_there(limit, further):
    """Every image goes as far as another one, and more of them would go beyond; a Clip would not let them."""
    seen = Histogram()
    images = [np.minimum(np.append(W(256, seed=i), 3.0 + 0.5 * i), limit).astype(np.float32) for i in range(12)]
    for image in images:
        seen.update(image)
    for image in images:
        for _ in range(gradients.PROBES):
            seen.feel(image, np.where(image > 2.5, 30.0, 1.0).astype(np.float32))

    found = gradient.find_range(seen, gradient.Options(), symmetric=False)[1]

    assert (found > 1.1 * seen.high) == further
