"""Where the level of a series changed: exact places on clean steps, next to no alarm on noise."""

import random

import pytest

from rdeploy import changepoints


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ([1.0] * 10 + [1.05] * 10, (10,)),
        ([1.0] * 8 + [2.0] * 8 + [1.5] * 8, (8, 16)),
        ([1.0] * 20, ()),
        ([1.0] * 9 + [3.0] + [1.0] * 9, ()),
        ([1.0, 1.0, 2.0, 2.0, 2.0], ()),
        ([], ()),
    ],
)
def test_steps_are_found_where_they_are_and_one_outlier_is_none(values, changes):
    assert changepoints.find(values) == changes


def test_levels_are_the_means_between_the_changes():
    assert changepoints.levels([1.0, 1.0, 1.0, 4.0, 6.0], (3,)) == ((0, 3, 1.0), (3, 5, 5.0))


def test_noise_is_no_change_and_a_shift_in_noise_is_one():
    rng = random.Random(0)
    quiet = [[rng.gauss(0.0, 0.02) for _ in range(30)] for _ in range(100)]
    shifted = [[rng.gauss(0.0, 0.02) + 0.08 * (i >= 15) for i in range(30)] for _ in range(50)]

    assert sum(bool(changepoints.find(one)) for one in quiet) <= 4
    assert sum(changepoints.find(one) in ((14,), (15,), (16,)) for one in shifted) >= 45
