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
    import dataclasses

    large, small = dataclasses.replace(parts, resolution=(32, 32)).batch(0, [1])

    assert (large == small).all()


def test_parts_are_as_large_as_the_test_crop_on_average_and_inside_the_image():
    size = (400, 600)
    test = preprocess.view(size, (32, 32), PLAIN)
    rng = np.random.default_rng(0)
    boxes = np.array([crops.random_box(size, test, rng) for _ in range(4000)])
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))

    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 400).all()
    assert (boxes[:, 3] <= 600).all()
    assert test[2] - test[0] == pytest.approx(320)
    assert np.exp(np.log(sides / 320).mean()) == pytest.approx(1.0, abs=0.02)
    assert sides.min() / 320 == pytest.approx(1 / crops.ZOOM, abs=0.02)
    assert sides.max() / 320 == pytest.approx(crops.ZOOM, abs=0.05)


def test_where_the_test_crop_is_the_image_parts_are_never_larger():
    rng = np.random.default_rng(0)
    boxes = np.array([crops.random_box((32, 32), (0.0, 0.0, 32.0, 32.0), rng) for _ in range(500)])

    assert (boxes[:, 2] - boxes[:, 0]).max() <= 32
    assert (boxes[:, 2] - boxes[:, 0]).min() > 32 / crops.ZOOM / crops._ASPECT


def test_half_of_the_parts_are_mirrored(parts):
    import dataclasses

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
    import dataclasses

    assert parts.truth(0, [1]) is None
    assert not parts.labelled
    assert dataclasses.replace(parts, labels=(3, 1, 2, 0, 0, 0)).truth(0, [1, 2]).tolist() == [1, 2]
