"""Cosine similarities in closed form, and the collapse of an embedding."""

import numpy as np
import pytest

from rdeploy.metrics import embedding


def test_cosines_are_by_image_and_do_not_depend_on_length():
    first = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    second = np.array([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])

    assert embedding.cosines(first, second) == pytest.approx([1.0, 2**-0.5, -1.0])


def test_a_vector_that_is_zero_or_broken_is_like_nothing():
    assert embedding.cosines(np.array([[0.0, 0.0], [np.nan, 1.0]]), np.ones((2, 2))).tolist() == [0.0, 0.0]


def test_likeness_is_the_mean_over_pairs_of_different_images():
    assert embedding.likeness(np.eye(4)) == pytest.approx(0.0)
    assert embedding.likeness(np.ones((4, 3))) == pytest.approx(1.0)
    assert embedding.likeness(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])) == pytest.approx(1 / 3)
    assert embedding.likeness(np.ones((1, 3))) == 0.0
