"""Accuracy on labels, against closed forms."""

import numpy as np
import pytest

from rdeploy.errors import ConfigError
from rdeploy.metrics import coco
from rdeploy.metrics.intervals import wilson_interval
from rdeploy.verify import accuracy, answers


def test_accuracy_counts_and_compares_with_the_native_model():
    classes = np.eye(4)
    native = classes[[0, 1, 2, 3]]
    variant = classes[[0, 1, 2, 0]]

    found = accuracy.top1(variant, [0, 1, 2, 3], native)

    assert (found.metric, found.labelled, found.samples) == ("top1", True, 4)
    assert (found.value, found.reference, found.drop) == (0.75, 1.0, 0.25)
    assert found.ci95 == wilson_interval(0.75, 4)


def test_the_native_model_is_its_own_reference():
    found = accuracy.top1(np.eye(2), [0, 0])

    assert (found.value, found.reference, found.drop) == (0.5, 0.5, 0.0)


def test_nan_is_never_a_right_answer():
    outputs = np.array([[np.nan, 0.0], [1.0, 0.0]])

    assert answers.decisions(outputs).tolist() == [-1, 0]
    assert accuracy.top1(outputs, [0, 0]).value == 0.5


def test_one_column_decides_by_its_sign():
    outputs = np.array([[-1.0], [2.0]])

    assert answers.decisions(outputs).tolist() == [0, 1]
    assert accuracy.top1(outputs, [0, 1]).value == 1.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], "1 labels for 2 images; give one label an image"),
        ([0, 9], r"label 9 is not a class of this model \(0 to 2\); check the labels"),
        ([-1, 0], r"label -1 is not a class of this model \(0 to 2\); check the labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        accuracy.top1(np.ones((2, 3)), labels)


def test_labels_need_class_scores():
    with pytest.raises(
        ConfigError, match=r"one row of class scores an image, the model's output has shape \(2, 3, 4, 4\)"
    ):
        accuracy.top1(np.ones((2, 3, 4, 4)), [0, 0])


def masks(*right):
    """Return the counts of images of 100 pixels in two classes of which so many are right."""
    return np.array([[[half, half], [50, 50], [50, 50]] for half in (share // 2 for share in right)])


def test_the_drop_of_miou_has_the_interval_of_a_paired_difference():
    rng = np.random.default_rng(0)
    native = masks(*rng.integers(20, 100, 60))  # images differ much, and the variant loses as much on each
    worse = native - [[[2, 2], [0, 0], [0, 0]]]

    same = accuracy.miou(native, native)
    found = accuracy.miou(worse, native)

    assert same.drop_ci95 == (0.0, 0.0)
    assert found.drop_ci95[0] <= found.drop <= found.drop_ci95[1]
    assert found.drop_ci95[1] - found.drop_ci95[0] < 0.1 * (found.ci95[1] - found.ci95[0])
    assert accuracy.miou(native).drop_ci95 is None


def test_the_drop_of_map_is_paired_as_well():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (extra: coco)")
    truth = [np.array([[0.1, 0.1, 0.5, 0.5, 0]])] * 8
    right = np.array([[0.1, 0.1, 0.5, 0.5, 0.9, 0]])
    native = coco.mean_average_precision([right] * 4 + [right[:0]] * 4, truth)

    assert native.ci95[0] < native.value < native.ci95[1]
    assert coco.lost(native, native) == (0.0, 0.0)
    none = coco.mean_average_precision([right[:0]] * 8, truth)
    assert coco.lost(none, native) == pytest.approx(native.ci95)
