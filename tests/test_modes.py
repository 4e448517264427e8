"""One speed or two: closed forms of the dip, and seeded distributions."""

import numpy as np
import pytest

from rdeploy import modes


@pytest.mark.parametrize("count", [4, 10, 101])
def test_evenly_spaced_points_have_the_smallest_dip(count):
    assert modes.dip(range(count)) == pytest.approx(1 / (2 * count))


def test_two_points_with_half_of_the_samples_each_have_the_largest():
    assert modes.dip([1.0] * 50 + [2.0] * 50) == 0.25


def test_one_point_is_one_mode():
    assert modes.dip([3.0] * 40) == 1 / 80


def test_three_clusters_by_hand():
    # F is 1/3, 2/3 and 1 at three equidistant points; the best unimodal one misses each outer jump by half.
    assert modes.dip([0.0] * 10 + [1.0] * 10 + [2.0] * 10) == pytest.approx(1 / 6)


@pytest.mark.parametrize("low", [0.2, 0.5, 0.85])
def test_two_speeds_are_found_with_their_medians_and_shares(low):
    rng = np.random.default_rng(0)
    count = int(400 * low)
    samples = rng.permutation(np.r_[rng.normal(5.0, 0.1, count), rng.normal(7.0, 0.1, 400 - count)])

    found = modes.find(samples.tolist())

    assert found.low_ms == pytest.approx(5.0, rel=0.01)
    assert found.high_ms == pytest.approx(7.0, rel=0.01)
    assert found.high_share == pytest.approx(1 - low)


@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy tail", "outliers", "uniform"])
def test_one_speed_is_one_speed_whatever_its_shape(shape):
    alarms = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        samples = {
            "normal": rng.normal(5.0, 0.5, 300),
            "skewed": 5.0 + rng.exponential(1.0, 300),
            "heavy tail": 5.0 + np.abs(rng.standard_cauchy(300)),
            "outliers": np.r_[rng.normal(5.0, 0.1, 285), rng.normal(20.0, 1.0, 15)],
            "uniform": rng.uniform(5.0, 6.0, 300),
        }[shape]
        alarms += modes.find(samples.tolist()) is not None

    assert alarms == 0


def test_two_peaks_that_nobody_would_notice_are_one_speed():
    rng = np.random.default_rng(0)

    assert modes.find(np.r_[rng.normal(5.0, 0.01, 200), rng.normal(5.1, 0.01, 200)].tolist()) is None


def test_few_samples_tell_nothing():
    assert modes.find([1.0, 2.0] * 15) is None
    assert modes.find([1.0, 2.0] * 16) is not None
