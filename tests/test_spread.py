"""Indices that are evenly spread, known in closed form."""

import pytest

from rdeploy import spread


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(10, 4, [0, 3, 6, 9]), (5, 2, [0, 4]), (3, 8, [0, 1, 2]), (1, 1, [0]), (7, 1, [0]), (0, 4, [])],
)
def test_evenly_holds_both_ends_and_nothing_twice(size, count, expected):
    assert spread.evenly(size, count) == expected


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(10, 4, [0, 2, 5, 7]), (9, 3, [0, 3, 6]), (3, 8, [0, 1, 2]), (3, 3, [0, 1, 2]), (0, 2, [])],
)
def test_shares_are_begun_by_their_first(size, count, expected):
    assert spread.shares(size, count) == expected
