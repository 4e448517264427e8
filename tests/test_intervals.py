"""The statistics behind a verdict, against closed forms, and their error rates on seeded noise."""

import math
import random

import pytest

from rdeploy import intervals
from rdeploy.errors import InvariantError


def test_the_interval_of_samples_is_students():
    found = intervals.of_samples([1.0, 2.0, 3.0])

    # Mean 2, standard deviation 1, t of 97.5 % at 2 degrees of freedom is 4.302653.
    assert found.interval(0.05) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_one_sample_has_no_interval():
    with pytest.raises(InvariantError, match="an interval needs at least two launches, not 1"):
        intervals.of_samples([1.0])


def test_pairs_cancel_what_disturbed_both():
    found = intervals.paired([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])

    assert found.mean == pytest.approx(math.log(2))
    assert found.variance == pytest.approx(0.0, abs=1e-30)


def test_an_assumed_deviation_gives_a_normal_interval():
    assert intervals.assumed(0.0, deviation=1.0).interval(0.05) == pytest.approx((-1.959964, 1.959964))
    assert intervals.assumed(3.0, deviation=0.0).interval(0.05) == (3.0, 3.0)


def test_a_difference_adds_variances_and_takes_welchs_degrees_of_freedom():
    first = intervals.Estimate(mean=3.0, variance=1.0, freedom=4)
    second = intervals.Estimate(mean=1.0, variance=1.0, freedom=4)

    found = intervals.difference(first, second)

    assert (found.mean, found.variance, found.freedom) == (2.0, 2.0, 8.0)
    assert intervals.difference(first, intervals.assumed(0.0, deviation=1.0)).freedom == 16.0


def test_what_all_looks_spend_adds_up_to_alpha():
    assert [intervals.spent(0.12, look) for look in (1, 2, 3)] == pytest.approx([0.06, 0.02, 0.01])
    assert sum(intervals.spent(0.01, look) for look in range(1, 100_000)) == pytest.approx(0.01, rel=1e-4)


def test_looks_come_at_half_as_many_launches_more():
    assert [intervals.next_look(n) for n in (1, 2, 6, 9)] == [2, 3, 9, 13]


def test_the_launches_that_would_settle_it_do():
    estimate = intervals.of_samples([0.01, -0.01, 0.02, -0.02, 0.0, 0.0])
    deviation = math.sqrt(estimate.variance * 6)

    count = intervals.launches_needed(estimate, launches=6, distance=0.008, alpha=0.01)

    assert intervals.quantile(0.995, count - 1) * deviation / math.sqrt(count) < 0.008
    assert intervals.quantile(0.995, count - 2) * deviation / math.sqrt(count - 1) >= 0.008
    assert intervals.launches_needed(estimate, launches=6, distance=1e-6, alpha=0.01) is None


def test_shares_without_disagreement_still_have_an_interval():
    low, high = intervals.share_difference(0, 0, 98, alpha=0.05)

    # Bonett and Price: both discordant shares are (0 + 1) / (98 + 2).
    half = 1.959964 * math.sqrt((0.02 - 0.0) / 100)
    assert (low, high) == pytest.approx((-half, half))


def test_a_share_that_fell_and_disagreement_widen_the_interval():
    fell = intervals.share_difference(10, 10, 98, alpha=0.05)
    torn = intervals.share_difference(10, 50, 98, alpha=0.05)

    assert (fell[0] + fell[1]) / 2 == pytest.approx(0.1)
    assert (torn[0] + torn[1]) / 2 == pytest.approx(0.1)
    assert torn[1] - torn[0] > fell[1] - fell[0]


def test_stopping_at_any_look_keeps_the_error_below_alpha():
    rng, alpha, crossed, trials = random.Random(7), 0.1, 0, 400
    for _ in range(trials):
        samples, look, count = [], 1, 4
        while count <= 20:
            samples += [rng.gauss(0.0, 1.0) for _ in range(count - len(samples))]
            low, high = intervals.of_samples(samples).interval(intervals.spent(alpha, look))
            if low > 0 or high < 0:
                crossed += 1
                break
            count, look = intervals.next_look(count), look + 1

    # Looking at the full level each time would cross in about 22 % of the trials.
    assert crossed / trials <= alpha
