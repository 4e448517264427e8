"""What is said of channels by the extremes of images."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from rdeploy.quantize.repair import extremes
from rdeploy.quantize.repair.extremes import Seen

TEXT = runpy.run_path(str(Path(__file__).parents[1] / "onnx_text.py"))
IMAGES = (
    np.random.default_rng(0).normal(size=(12, 1, 3, 4, 4)).astype(np.float32) * np.array([1, 5, 0.1])[:, None, None]
)


def seen(images, axes=(1,)):
    found = Seen.nothing(3)
    for image in images:
        found.add(image.astype(np.float32), axes)
    return found


def test_the_ends_are_the_mean_and_the_fourth_root_of_the_fourth_central_moment():
    low, high = IMAGES.min(axis=(1, 3, 4)), IMAGES.max(axis=(1, 3, 4))

    found = seen(IMAGES).channels()

    for ends, sign, of in ((low, -1, found.low), (high, 1, found.high)):
        beyond = np.power(np.power(ends - ends.mean(axis=0), 4).mean(axis=0), 0.25)
        assert of == pytest.approx(ends.mean(axis=0) + sign * beyond, rel=1e-5)
    assert found.mean_square == pytest.approx(np.square(IMAGES).mean(axis=(0, 1, 3, 4)), rel=1e-5)


def test_a_channel_that_answers_to_one_image_in_ten_is_sized_by_that_one():
    images = np.zeros((20, 1, 3, 2, 2))
    images[:, :, 0] = 1.0
    images[[3, 14], :, 1] = 1.0

    high = seen(images).channels().high

    assert high[0] == pytest.approx(1.0)
    assert 0.5 < high[1] < 1.0  # its mean is 0.1


def test_the_sums_over_two_halves_are_those_over_all():
    apart, together = seen(IMAGES[:6]).with_others(seen(IMAGES[6:])).channels(), seen(IMAGES).channels()

    for one, other in zip((apart.low, apart.high, apart.highest), (together.low, together.high, together.highest)):
        assert one == pytest.approx(other)


def test_channels_may_lie_along_another_axis():
    moved = [np.moveaxis(image, 1, -1) for image in IMAGES]

    assert seen(moved, axes=(3,)).channels().high == pytest.approx(seen(IMAGES).channels().high)


def test_a_channel_may_reach_more_than_was_seen_and_one_that_was_never_seen_anything():
    images = np.full((4, 1, 3, 2, 2), -1.0)
    images[:, :, 0] = 2.0
    images[::2, :, 1], images[1::2, :, 1] = 1.0, 3.0  # one half of the images went three times as far as the other

    assert seen(images).channels().reach(2.0) == pytest.approx([4.0, 9.0, np.inf])
    assert (seen(images).channels().reach(np.inf) == np.inf).all()


def test_every_tensor_that_could_be_scaled_is_watched(tmp_path):
    arrays = {"w": np.ones((4, 3, 1, 1), np.float32), "v": np.ones((2, 4, 1, 1), np.float32)}
    path = TEXT["write"](tmp_path / "fp32.onnx", "a = Conv(x, w) r = Relu(a) y = Conv(r, v)", x=(1, 3, 4, 4), **arrays)

    found = extremes.observe(path, [image.astype(np.float32) for image in IMAGES])

    assert set(found) == {"a", "r"}
    assert found["r"].images == len(IMAGES)
    assert (extremes.channels_of(found)["r"].low == 0).all()
