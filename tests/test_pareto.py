import pytest

from rdeploy import pareto


def front(points, **options):
    return list(pareto.front(points, cost=lambda p: p[0], loss=lambda p: p[1], **options))


def test_what_another_beats_in_both_is_not_on_it():
    assert front([(8, 0), (9, 2), (4, 1), (2, 3), (3, 4)]) == [(2, 3), (4, 1), (8, 0)]


def test_costs_within_the_noise_are_one():
    assert front([(100, 1.0), (102, 0.5)]) == [(102, 0.5)]
    assert front([(100, 1.0), (102, 0.5)], noise=0.0) == [(100, 1.0), (102, 0.5)]


@pytest.mark.parametrize("points", [[], [(1, 1)]])
def test_none_and_one(points):
    assert front(points) == points


def test_equal_points_are_there_once():
    assert front([(1, 1), (1, 1)]) == [(1, 1)]


def test_the_noise_does_not_add_up_along_a_row():
    assert front([(1.0, 5), (1.029, 4), (1.058, 3), (1.089, 2)]) == [(1.029, 4), (1.089, 2)]


def test_what_is_left_out_has_one_that_loses_no_more_and_costs_hardly_more():
    points = [(1.02**i, 50 - i) for i in range(50)]
    kept = front(points)

    assert len(kept) == 25
    assert all(any(c <= cost * 1.03 and lost <= loss for c, lost in kept) for cost, loss in points)
