import math

import numpy as np
import pytest

from rdeploy.quantize.histogram import Histogram, even_stride, settled


def seen(*arrays, **facts):
    histogram = Histogram(**facts)
    for array in arrays:
        histogram.update(np.asarray(array, np.float32))
    return histogram


def held(histogram):
    """Return all the mass that a histogram holds."""
    return histogram.counts.sum() + histogram.zeros


def test_extremes_are_exact_over_all_values_even_where_few_are_sampled():
    values = np.zeros(100_003, np.float32)
    values[[17, 90_001]] = -3.25, 7.5

    histogram = seen(values, sample=100)

    assert (histogram.low, histogram.high) == (-3.25, 7.5)


def test_extremes_are_those_of_every_batch():
    histogram = seen([1, 2], [-4, 0], [3, 3])

    assert (histogram.low, histogram.high, histogram.batches) == (-4, 3, 3)


def test_every_value_lies_in_its_bin():
    histogram = seen([-1.0, -0.6, 0.3, 1.0], bins=4)

    assert histogram.counts.tolist() == [2, 0, 1, 1]
    assert histogram.centers.tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_the_limit_doubles_and_pairs_of_bins_merge_when_a_value_falls_outside():
    histogram = seen([-1.0, -0.6, 0.3, 1.0], [1.5], bins=4)

    assert histogram.limit == 2
    assert histogram.counts.tolist() == [0, 2, 2, 1]


def test_growing_by_a_million_conserves_the_mass():
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=997) * 10.0**power for power in range(-3, 4)]

    histogram = seen(*batches)

    assert held(histogram) == 7 * 997
    assert histogram.limit >= max(-histogram.low, histogram.high)


def test_growing_keeps_every_value_within_a_bin_of_where_it_was():
    histogram = seen([0.5], [40.0])

    centers, counts = histogram.filled()

    assert counts.tolist() == [1, 1]
    assert centers == pytest.approx([0.5, 40.0], abs=histogram.limit / histogram.bins)


def test_exact_zeros_are_counted_apart():
    histogram = seen([0, 0, 0, 1.0, -1.0])

    assert histogram.zeros == 3
    assert histogram.counts.sum() == 2


def test_the_zeros_of_a_batch_that_holds_nothing_else_are_counted_as_well():
    histogram = seen(np.zeros(5), [1.0, 0.0])

    assert histogram.zeros == 6
    assert held(histogram) == 7


def test_an_all_zero_tensor_has_no_filled_bins():
    centers, counts = seen(np.zeros((1, 2, 3))).filled()

    assert centers.size == counts.size == 0


def test_values_too_small_for_their_reciprocal_are_counted():
    histogram = seen([1e-40, -1e-40, 0.0], [1e-41])

    assert held(histogram) == 4


@pytest.mark.parametrize("axis", [1, 3])
def test_a_value_counts_as_much_as_its_channel(axis):
    array = np.zeros((1, 2, 2, 2), np.float32)
    first, second = np.moveaxis(array, axis, 0)
    first[...], second[...] = -1.0, 1.0

    histogram = seen(array, bins=2, weights=np.array([0.5, 1.5]), axis=axis)

    assert histogram.counts.tolist() == [4 * 0.5, 4 * 1.5]


def test_the_zeros_of_a_channel_count_as_much_as_the_channel():
    array = np.array([0, 0, 0, 4], np.float32).reshape(1, 2, 2)

    histogram = seen(array, weights=np.array([0.25, 1.75]))

    assert histogram.zeros == 2 * 0.25 + 1.75
    assert histogram.counts.sum() == 1.75


def test_weights_of_another_number_of_channels_are_left_out():
    histogram = seen(np.ones((1, 3, 2)), weights=np.array([0.1, 0.2]))

    assert histogram.counts.sum() == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        seen([0.0, bad, 1.0])


def test_what_is_kept_does_not_grow_with_the_batches():
    rng = np.random.default_rng(1)
    histogram = Histogram(sample=256)
    sizes = set()
    for index in range(50):
        histogram.update(rng.normal(size=(1, 4, 31, 31)).astype(np.float32) * (index + 1))
        sizes.add(histogram.counts.nbytes)

    assert sizes == {4096 * 8}
    assert not hasattr(histogram, "__dict__")  # slots: nowhere to keep a batch
    assert held(histogram) <= 50 * 256


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 2**14, 2**20, 3 * 224 * 224, 64 * 112 * 112])
def test_the_stride_shares_no_factor_with_the_size_and_keeps_enough(size):
    stride = even_stride(size, 256)

    assert math.gcd(stride, size) == 1 or size == 1
    kept = -(-size // stride)
    assert kept <= 256
    assert kept > 256 // 4 or kept == size


def test_sampling_sees_every_column_of_a_feature_map():
    array = np.broadcast_to(np.arange(1, 65, dtype=np.float32), (1, 8, 64, 64))

    histogram = seen(array, sample=4096, bins=8192)

    centers, _ = histogram.filled()
    assert np.unique(np.rint(centers)).size == 64


def test_the_batch_that_last_moved_a_range_is_known():
    wide, late = Histogram(), Histogram()
    for size in (1.0, 2.0, 2.01, 0.5):
        wide.update(np.array([-size, size]))
    for size in (1.0, 1.0, 1.0, 3.0):
        late.update(np.array([-size, size]))

    assert (wide.moved, late.moved) == (2, 4)
    assert settled([wide]) == 2
    assert settled([wide] * 39 + [late]) == 2  # one tensor in forty may still move
    assert settled([wide, late, late]) == 4
    assert settled([]) == 0
