"""mIoU from counts, in closed form, at the mask's own resolution."""

import numpy as np
import pytest

from rdeploy.errors import ConfigError
from rdeploy.metrics import segmentation
from rdeploy.metrics.intervals import bootstrap_interval, mean_interval

WHOLE = (0.0, 0.0, 4.0, 6.0)


def test_counts_and_mean_iou_are_the_closed_form():
    mask = np.array([[0, 0, 1], [1, 1, 255]])
    found = np.array([[0, 1, 1], [1, 0, 2]])

    counts = segmentation.count(found, mask, 3, (255,))

    assert counts.tolist() == [[1, 2, 0], [2, 3, 0], [2, 3, 0]]
    # class 0: 1 / (2 + 2 - 1); class 1: 2 / (3 + 3 - 2); class 2 occurs nowhere and does not count
    assert segmentation.mean_iou(counts[None])[0] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_an_undecided_pixel_is_wrong_and_predicts_nothing():
    counts = segmentation.count(np.array([[-1, 0]]), np.array([[0, 0]]), 2, (255,))

    assert counts.tolist() == [[1, 0], [2, 0], [1, 0]]


def test_a_class_that_the_model_does_not_have_is_refused_with_the_option_that_declares_it():
    with pytest.raises(
        ConfigError, match=r"a mask holds class 11, but the model has 11 classes \(0 to 10\).*--void 11"
    ):
        segmentation.count(np.zeros((1, 1), int), np.array([[11]]), 11, (255,))
    assert segmentation.count(np.zeros((1, 1), int), np.array([[11]]), 11, (255, 11)).sum() == 0


def test_scores_are_enlarged_before_the_decision_as_pytorch_does():
    torch = pytest.importorskip("torch", reason="compared with PyTorch's bilinear interpolation")
    scores = np.random.default_rng(0).standard_normal((3, 4, 6)).astype(np.float32)

    found, seen = segmentation.on_mask(scores, (9, 17), (0.0, 0.0, 9.0, 17.0))

    exact = torch.nn.functional.interpolate(torch.from_numpy(scores)[None], size=(9, 17), mode="bilinear")
    assert (found == exact[0].argmax(0).numpy()).mean() > 0.99
    assert seen == (slice(0, 9), slice(0, 17))


def test_only_what_the_network_saw_of_a_mask_is_scored():
    scores = np.zeros((2, 2, 2), np.float32)
    scores[0, :, 0] = scores[1, :, 1] = 1.0

    found, seen = segmentation.on_mask(scores, (4, 8), (0.0, 2.0, 4.0, 6.0))

    assert seen == (slice(0, 4), slice(2, 6))
    assert found.tolist() == [[0, 0, 1, 1]] * 4


def test_one_channel_is_yes_or_no_and_nan_is_undecided():
    scores = np.array([[[[1.0, -1.0]]], [[[np.nan, 2.0]]]])

    assert segmentation.classes_of(scores).tolist() == [[[1, 0]], [[-1, 1]]]
    assert segmentation.number_of_classes(1) == 2


def test_the_interval_resamples_images_not_pixels():
    good = segmentation.count(np.zeros((10, 10), int), np.zeros((10, 10), int), 2, ())
    bad = segmentation.count(np.ones((10, 10), int), np.zeros((10, 10), int), 2, ())

    value, (low, high) = segmentation.miou(np.stack([good, bad] * 8))

    assert value == pytest.approx(0.25)  # class 0: half of its union, class 1: none
    assert low < 0.2
    assert high > 0.3


def test_the_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)

    low, high = mean_interval(values)

    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert low < values.mean() < high
    assert bootstrap_interval(np.ones((5, 1)), lambda sums: sums[:, 0] / 5) == (1.0, 1.0)
