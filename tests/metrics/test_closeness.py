import math

import numpy as np
import pytest

from rdeploy.metrics.closeness import Closeness, Gain, answers, closeness, helps


def logits(*rows):
    return [np.array(row, np.float32) for row in rows]


def test_classes_are_compared_by_decision_and_by_the_native_distribution():
    even = logits([0, 0], [0, 0])

    found = closeness(logits([0, 0], [0, math.log(3)]), even, task="classification")

    assert found.decided.tolist() == [1.0, 0.0]
    # sum of p log q: for q = (1/2, 1/2) it is -log 2, for q = (1/4, 3/4) the mean of their logarithms.
    assert found.smooth == pytest.approx([-math.log(2), (math.log(0.25) + math.log(0.75)) / 2], rel=1e-6)
    assert found.share == 0.5


def test_with_labels_it_is_right_and_the_labels_likelihood():
    found = closeness(logits([0, math.log(3)]), logits([9, 0]), task="classification", labels=[1])

    assert found.decided.tolist() == [1.0]
    assert found.smooth == pytest.approx([math.log(0.75)])


def test_one_logit_is_yes_or_no():
    found = closeness(logits([2.0], [2.0]), logits([1.0], [-1.0]), task="classification")

    assert found.decided.tolist() == [1.0, 0.0]


def test_what_is_not_finite_is_far_away_and_breaks_nothing():
    found = closeness(logits([math.nan, math.inf]), logits([1, 0]), task="classification")

    assert np.isfinite(found.smooth).all()
    assert found.decided.tolist() == [0.0]


def test_pixels_boxes_and_vectors_are_shares_in_themselves():
    classes = [np.array([[0, 1], [1, 1]], np.int16)], [np.array([[0, 1], [0, 0]], np.int16)]
    assert closeness(*classes, task="segmentation").decided.tolist() == [0.5]
    vectors = logits([1, 0], [1, 1]), logits([0, 2], [3, 3])
    assert closeness(*vectors, task="embedding").decided == pytest.approx([0.0, 1.0])
    box = np.array([[0, 0, 10, 10, 0.9, 1]], np.float32)
    nothing = np.zeros((0, 6), np.float32)
    assert closeness([box, box, nothing], [box, nothing, nothing], task="detection").decided.tolist() == [1.0, 0.0, 1.0]


def test_raw_outputs_become_compact_answers():
    scores = np.zeros((2, 3, 4, 5), np.float32)
    scores[:, 1] = 1
    dense = answers([scores], task="segmentation", frame=(4, 5))
    vectors = answers([np.ones((2, 7), np.float32)], task="embedding", frame=(4, 5))

    assert [one.tolist() for one in dense] == [np.ones((4, 5)).tolist()] * 2
    assert [one.shape for one in vectors] == [(7,), (7,)]


def test_a_gain_is_paired():
    before = Closeness(np.array([1.0, 0.0] * 50), np.zeros(100))
    after = Closeness(np.array([1.0, 1.0] * 50), np.zeros(100))
    same = Gain.between(before, before)

    gain = Gain.between(before, after)

    assert gain.value == 0.5
    assert 0.35 < gain.ci95[0] < 0.5 < gain.ci95[1] < 0.65
    assert (same.value, same.ci95) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("decided", "smooth", "kept"), [(0.6, -0.9, True), (0.6, -1.1, False), (0.5, -0.9, False), (0.4, -0.5, False)]
)
def test_a_change_has_to_be_right_more_often_and_not_less_sure(decided, smooth, kept):
    before = Closeness(np.array([0.5]), np.array([-1.0]))

    assert helps(before, Closeness(np.array([decided]), np.array([smooth]))) is kept
