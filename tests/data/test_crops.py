import dataclasses

import numpy as np
import pytest
from PIL import Image

from rdeploy.data import crops, images, pairs, preprocess
from rdeploy.types import Preprocessing

PLAIN = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=0.8)


@pytest.fixture
def parts(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", array)
    return crops.RandomParts(
        images=images.collect(tmp_path / "images.npy"),
        labels=None,
        channels=3,
        native=(32, 32),
        native_preprocessing=PLAIN,
        resolution=(16, 16),
        preprocessing=PLAIN,
    )


def test_both_networks_see_the_same_part(parts):
    large, small = parts.batch(0, [0, 3])

    assert (large.shape, small.shape) == ((2, 32, 32, 3), (2, 16, 16, 3))
    halved = large.reshape(2, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small).mean() < 12  # noise of 0..255, seen through nearly the same filter


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone(parts):
    first = parts.batch(1, [2, 4])[1]

    assert (parts.batch(1, [4, 2])[1][::-1] == first).all()
    assert (parts.batch(2, [2, 4])[1] != first).any()


def test_inside_the_network_both_are_given_the_same_image(parts):
    large, small = dataclasses.replace(parts, resolution=(32, 32)).batch(0, [1])

    assert (large == small).all()


@pytest.mark.parametrize(("crop", "inside"), [(0.6, True), (1.0, False)])
def test_parts_are_as_large_as_the_test_crop_on_average_and_where_the_image_has_room_inside_it(crop, inside):
    size = (400, 600)
    test = preprocess.view(size, (32, 32), dataclasses.replace(PLAIN, crop_pct=crop))
    side = test[2] - test[0]
    rng = np.random.default_rng(0)
    boxes = np.array([crops.random_box(size, test, (32, 32), rng) for _ in range(4000)])
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) / side

    assert side == pytest.approx(400 * crop, rel=0.02)
    beyond = max(-boxes[:, :2].min(), (boxes[:, 2:] - size).max())
    assert (beyond <= 0) if inside else (0 < beyond < 400 * 0.3)
    assert np.exp(np.log(sides).mean()) == pytest.approx(1.0, abs=0.02)
    assert sides.min() == pytest.approx(1 / crops.ZOOM, abs=0.02)
    assert sides.max() == pytest.approx(crops.ZOOM, abs=0.02)
    assert np.isclose(boxes[:, 2] - boxes[:, 0], side).mean() == pytest.approx(0.5, abs=0.05)


def test_half_of_the_parts_hold_the_very_pixels_that_the_network_will_see(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", array)
    whole = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
    parts = crops.RandomParts(
        images=images.collect(tmp_path / "images.npy"), labels=None, channels=3, native=(32, 32), native_preprocessing=whole,
        resolution=(32, 32), preprocessing=whole, flips=False,
    )  # fmt: skip

    found = parts.batch(0, list(range(40)))[0]

    around = np.pad(array, ((0, 0), (4, 4), (4, 4), (0, 0)), "reflect")
    moved = [[(around[:, y : y + 32, x : x + 32] == found).all((1, 2, 3)) for x in range(9)] for y in range(9)]
    places = np.argwhere(moved)[:, :2]
    assert 12 <= np.sum(np.any(moved, (0, 1))) <= 28
    assert len(np.unique(places, axis=0)) > 8  # moved to all sides


def test_half_of_the_parts_are_mirrored(parts):
    plain = dataclasses.replace(parts, flips=False)
    mirrored = 0
    for epoch in range(40):
        with_flips, without = parts.batch(epoch, [0])[0], plain.batch(epoch, [0])[0]
        same, flipped = (with_flips == without).all(), (with_flips[:, :, ::-1] == without).all()
        assert same or flipped
        mirrored += bool(flipped)
    assert 10 <= mirrored <= 30


@pytest.mark.parametrize("scale", [1, 2])
def test_masks_are_cut_and_flipped_as_their_images_are(tmp_path, scale):
    """The class of a pixel is its grey level over 64; a mask may be larger than its image."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        classes = rng.integers(0, 4, (5, 7)).astype(np.uint8).repeat(12, 0).repeat(12, 1)
        Image.fromarray(classes * 64).save(tmp_path / f"images/{index}.png")
        Image.fromarray(classes.repeat(scale, 0).repeat(scale, 1)).save(tmp_path / f"masks/{index}.png")
    sharp = Preprocessing(mean=(0.5,), std=(0.5,), interpolation="nearest", crop_pct=0.8)
    parts = crops.RandomParts(
        images=pairs.collect_pairs(str(tmp_path)), labels=None, channels=1, native=(40, 40), native_preprocessing=sharp,
        resolution=(20, 20), preprocessing=sharp, void=(3,),
    )  # fmt: skip

    for epoch in range(4):
        large, _ = parts.batch(epoch, [0, 1, 2])
        wanted = large[..., 0].astype(np.int64) // 64
        found = parts.truth(epoch, [0, 1, 2])
        assert parts.labelled
        assert np.mean(found == np.where(wanted == 3, crops.IGNORED, wanted)) > 0.97  # edges are rounded


def test_classes_of_images_are_their_truth(parts):
    assert parts.truth(0, [1]) is None
    assert not parts.labelled
    assert dataclasses.replace(parts, labels=(3, 1, 2, 0, 0, 0)).truth(0, [1, 2]).tolist() == [1, 2]
