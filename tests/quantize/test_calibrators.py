"""The contract of every calibrator that the folder holds, and the closed forms of those that have one."""

import numpy as np
import pytest

from rdeploy import plugins
from rdeploy.errors import ConfigError
from rdeploy.quantize import calibrators
from rdeploy.quantize.calibrators import mse
from rdeploy.quantize.histogram import Histogram

GAUSSIAN = np.random.default_rng(0).normal(size=200_000)
TENSORS = {
    "gaussian": GAUSSIAN,
    "shifted": GAUSSIAN + 2.5,
    "laplace": np.random.default_rng(1).laplace(size=100_000),
    "positive": np.abs(GAUSSIAN),
    "negative": -np.abs(GAUSSIAN) - 1,
    "relu6": np.clip(4 * GAUSSIAN, 0, 6),
    "zero": np.zeros(1000),
    "constant": np.full(1000, 3.5),
    "negative constant": np.full(1000, -0.25),
    "single value": np.array([1e-3]),
    "two values": np.array([-1.0, 2.0]),
    "outlier": np.append(GAUSSIAN, 1e6),
    "sparse": np.append(np.zeros(100_000), [0.5, 1.0]),
    "denormal": np.full(10, 1e-40),
}


def seen(*arrays, **facts):
    histogram = Histogram(sample=1 << 20, **facts)
    for array in arrays:
        histogram.update(np.asarray(array, np.float32))
    return histogram


def find(name, histogram, *, symmetric, **options):
    plugin = calibrators.find(name)
    return plugin.find_range(histogram, plugin.Options(**options), symmetric=symmetric)


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", calibrators.names())
def test_a_range_holds_zero_and_nothing_that_was_not_seen(name, symmetric, tensor):
    histogram = seen(TENSORS[tensor])

    low, high = find(name, histogram, symmetric=symmetric)

    assert low <= 0 <= high
    peak = max(-histogram.low, histogram.high)
    if symmetric:
        assert low == -high
        assert high <= peak
    else:
        assert min(histogram.low, 0) <= low
        assert high <= max(histogram.high, 0)
    assert (high - low > 0) == (peak > 0)


@pytest.mark.parametrize("name", calibrators.names())
def test_a_constant_is_kept(name):
    _, high = find(name, seen(TENSORS["constant"]), symmetric=False)

    assert high == pytest.approx(3.5, rel=0.02)


@pytest.mark.parametrize("name", calibrators.names())
def test_a_one_sided_tensor_wastes_nothing_on_the_other_side(name):
    assert find(name, seen(TENSORS["positive"]), symmetric=False)[0] == 0
    assert find(name, seen(TENSORS["negative"]), symmetric=False)[1] == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", calibrators.names())
def test_doubling_the_tensor_doubles_its_range(name, symmetric):
    once = find(name, seen(GAUSSIAN), symmetric=symmetric)
    twice = find(name, seen(2 * GAUSSIAN), symmetric=symmetric)

    assert twice == pytest.approx((2 * once[0], 2 * once[1]), rel=1e-6)


@pytest.mark.parametrize("name", calibrators.names())
def test_the_mirrored_tensor_has_the_mirrored_range(name):
    low, high = find(name, seen(TENSORS["shifted"]), symmetric=False)

    mirrored = find(name, seen(-TENSORS["shifted"]), symmetric=False)

    assert mirrored == pytest.approx((-high, -low), rel=0.02, abs=0.01)


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_a_thousand_batches_give_the_range_that_one_gives(name):
    rng = np.random.default_rng(3)
    batches = rng.laplace(size=(300, 1000))

    once, streamed = (find(name, seen(*b), symmetric=True)[1] for b in ([batches.reshape(-1)], batches))

    assert streamed == pytest.approx(once, rel=0.1)


def test_minmax_is_exact():
    histogram = seen([-1.25, 0.5], [2.75])

    assert find("minmax", histogram, symmetric=False) == (-1.25, 2.75)
    assert find("minmax", histogram, symmetric=True) == (-2.75, 2.75)


@pytest.mark.parametrize(("symmetric", "expected"), [(False, (-0.75, 4.0)), (True, (-4.0, 4.0))])
def test_mean_extremes_are_those_of_the_images_averaged(symmetric, expected):
    """Lowest values -1, -1, -1 and 0, highest 2, 2, 2 and 10."""
    arrays = [[-1.0, 0.5, 2.0]] * 3 + [[0.0, 10.0]]

    assert find("mean_extremes", seen(*arrays), symmetric=symmetric) == pytest.approx(expected)


def test_minmax_never_clips_an_outlier():
    assert find("minmax", seen(TENSORS["outlier"]), symmetric=False)[1] == 1e6


@pytest.mark.parametrize("percentile", [90.0, 98.0, 99.9])
def test_percentile_of_a_uniform_distribution(percentile):
    histogram = seen(np.linspace(-1, 1, 400_001))
    cut = 1 - percentile / 100

    assert find("percentile", histogram, symmetric=True, percentile=percentile) == pytest.approx(
        (-1 + cut, 1 - cut), abs=2e-3
    )
    assert find("percentile", histogram, symmetric=False, percentile=percentile) == pytest.approx(
        (-1 + cut, 1 - cut), abs=2e-3
    )


def test_percentile_takes_half_of_the_share_from_each_side_of_an_affine_range():
    histogram = seen(np.linspace(-1, 3, 400_001))

    low, high = find("percentile", histogram, symmetric=False, percentile=90.0)

    assert (low, high) == pytest.approx((-0.8, 2.8), abs=5e-3)


def test_zeros_count_in_a_percentile():
    values = np.append(np.zeros(90_000), np.linspace(0, 1, 10_001)[1:])

    _, high = find("percentile", seen(values), symmetric=True, percentile=99.0)

    assert high == pytest.approx(0.9, abs=2e-3)  # 1 % of all values is 10 % of those that are not zero


def test_the_hundredth_percentile_is_everything():
    assert find("percentile", seen([-1.0, 0.3, 2.0]), symmetric=False, percentile=100.0) == pytest.approx(
        (-1, 2), rel=1e-3
    )


def test_percentile_gives_up_an_outlier():
    assert find("percentile", seen(TENSORS["outlier"]), symmetric=True)[1] < 1000


@pytest.mark.parametrize("percentile", [50.0, 0.0, -1.0, 100.1, float("nan")])
def test_a_percentile_outside_50_to_100_is_refused(percentile):
    options = calibrators.find("percentile").Options

    with pytest.raises(ConfigError, match=r"calibrator percentile: .* is not between 50 and 100"):
        plugins.make_options(options, {"percentile": percentile}, where="calibrator percentile")


@pytest.mark.parametrize("power", [0.0, -2.0, float("nan")])
def test_an_error_with_a_power_that_is_not_positive_is_refused(power):
    with pytest.raises(ConfigError, match=r"calibrator mse: power .* must be above 0"):
        calibrators.find("mse").Options(power=power)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_that_is_not_positive_is_refused(stride):
    with pytest.raises(ConfigError, match=r"calibrator entropy: stride .* must be at least 1"):
        calibrators.find("entropy").Options(stride=stride)


def test_mse_clips_a_gaussian_where_8_bits_are_known_to_want_it():
    """The optimum for a Gaussian in 256 symmetric levels is 3.92 sigma (Banner et al., 2019, table of optimal clipping)."""
    histogram = seen(np.random.default_rng(5).normal(size=1_000_000))

    _, high = find("mse", histogram, symmetric=True)

    assert high == pytest.approx(3.92, rel=0.06)


def test_mse_keeps_all_of_a_uniform_distribution():
    low, high = find("mse", seen(np.linspace(-1, 1, 200_001)), symmetric=False)

    assert (low, high) == pytest.approx((-1, 1), rel=0.02)


def test_mse_is_not_beaten_by_any_clipping_of_minmax():
    values = TENSORS["laplace"].astype(np.float32)
    _, high = find("mse", seen(values), symmetric=True)

    def error(limit):
        step = limit / 127
        return np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean()

    rivals = [error(np.abs(values).max() * share) for share in np.linspace(0.1, 1, 40)]
    assert error(high) <= 1.02 * min(rivals)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_beyond_a_range_is_cut_at_its_end_whatever_its_steps_round_to(symmetric):
    options = calibrators.find("mse").Options()
    high = np.linspace(3.0, 6.0, 101)
    low = -high if symmetric else np.zeros_like(high)

    errors = [mse.error(np.array([10.0]), np.array([1.0]), 1e-4, span, symmetric, options) for span in zip(low, high)]

    assert errors == pytest.approx(np.square(10.0 - high))


def test_a_higher_power_minds_the_outliers_more():
    histogram = seen(TENSORS["laplace"])

    assert find("mse", histogram, symmetric=True, power=4.0)[1] > find("mse", histogram, symmetric=True)[1]


def test_a_value_that_matters_is_not_given_up():
    """A small weight on the channel with the outliers moves the range to where the other channel lies."""
    array = np.stack([GAUSSIAN, 60 * GAUSSIAN])[None].astype(np.float32)
    equal = find("mse", seen(array), symmetric=True)[1]

    small_matters = find("mse", seen(array, weights=np.array([2 - 1e-6, 1e-6])), symmetric=True)[1]

    assert small_matters < equal / 5


def test_entropy_clips_the_long_tail():
    heavy = np.random.default_rng(2).standard_t(2, size=200_000)

    _, high = find("entropy", seen(heavy), symmetric=True)

    assert 2 < high < 0.2 * np.abs(heavy).max()


def test_entropy_keeps_the_range_of_a_saturated_relu6():
    assert find("entropy", seen(TENSORS["relu6"]), symmetric=False) == (0, 6)
    assert find("entropy", seen(TENSORS["relu6"]), symmetric=True) == (-6, 6)


def test_entropy_keeps_an_end_where_a_clip_saturates_although_the_rest_lies_far_from_it():
    values = np.repeat([0.003, 0.03, 6.0], [99_500, 100, 400])

    assert find("entropy", seen(values), symmetric=True)[1] == 6
    assert find("entropy", seen(np.repeat([0.003, 0.03, 6.0], [99_890, 100, 10])), symmetric=True)[1] < 1


def test_a_calibrator_that_is_not_there_is_named_with_the_closest_one():
    with pytest.raises(ConfigError, match=r"unknown calibrator 'entropie', did you mean 'entropy'\?; there are: "):
        calibrators.find("entropie")
