"""Images and masks, found together or refused in words."""

import numpy as np
import pytest
from PIL import Image

from rdeploy.data import images, pairs
from rdeploy.errors import ConfigError


@pytest.fixture
def scenes(tmp_path):
    """Three images of two cities, two of them with a mask."""
    for name in ("bonn/a", "bonn/b", "ulm/c"):
        for part, suffix in (("images", "jpg"), ("masks", "png")):
            file = tmp_path / part / f"{name}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 6), len(name), np.uint8)).save(file)
    (tmp_path / "masks/bonn/b.png").unlink()
    return tmp_path


def test_images_are_paired_with_the_masks_of_the_same_name(scenes):
    found = pairs.collect_pairs(str(scenes))

    assert [path.removeprefix(str(scenes)) for path in found.paths] == ["/images/bonn/a.jpg", "/images/ulm/c.jpg"]
    assert [path.removeprefix(str(scenes)) for path in found.masks] == ["/masks/bonn/a.png", "/masks/ulm/c.png"]
    assert found.skipped == ((str(scenes / "images/bonn/b.jpg"), "it has no mask"),)
    assert found.labels is None


def test_a_changed_mask_changes_the_hash(scenes):
    before = pairs.collect_pairs(str(scenes)).sha256
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(scenes / "masks/ulm/c.png")

    assert pairs.collect_pairs(str(scenes)).sha256 != before


def test_a_sample_keeps_images_and_masks_together(scenes):
    found = pairs.collect_pairs(str(scenes), limit=1, seed=3)

    assert len(found.paths) == len(found.masks) == 1
    assert found.paths[0].split("/")[-1][0] == found.masks[0].split("/")[-1][0]


def test_calibration_never_takes_masks_for_images(scenes):
    assert pairs.images_below(str(scenes)) == str(scenes / "images")
    assert pairs.images_below(str(scenes / "images")) == str(scenes / "images")
    assert len(images.collect(pairs.images_below(str(scenes)))) == 3


def test_a_folder_without_masks_is_refused(scenes):
    with pytest.raises(ConfigError, match="holds no images with masks: give a folder with images/ and masks/ in it"):
        pairs.collect_pairs(str(scenes / "images"))
    for file in (scenes / "masks").rglob("*.png"):
        file.unlink()
    with pytest.raises(ConfigError, match="none of the 3 images of .* has a mask in"):
        pairs.collect_pairs(str(scenes))


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB"])
def test_class_indices_are_read_from_every_kind_of_picture(tmp_path, mode):
    indices = np.array([[0, 3], [200, 255]], np.uint8)
    if mode == "P":
        picture = Image.fromarray(indices).convert("P")
        picture.putdata(indices.ravel().tolist())
        picture.putpalette(list(range(255, -1, -1)) * 3)
    elif mode == "RGB":
        picture = Image.fromarray(np.repeat(indices[:, :, None], 3, axis=2))
    else:
        picture = Image.fromarray(indices.astype(np.uint16 if mode == "I;16" else np.uint8))
    picture.save(tmp_path / "mask.png")

    assert pairs.read_mask(str(tmp_path / "mask.png")).tolist() == indices.tolist()


def test_a_coloured_mask_and_a_damaged_one_are_refused(tmp_path):
    colours = np.zeros((2, 2, 3), np.uint8)
    colours[0, 0] = (128, 0, 0)
    Image.fromarray(colours).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")

    with pytest.raises(ConfigError, match=r"mask.png is a colour picture \(RGB\): give a folder"):
        pairs.read_mask(str(tmp_path / "mask.png"))
    with pytest.raises(ConfigError, match="broken.png could not be read: not an image that Pillow can open"):
        pairs.read_mask(str(tmp_path / "broken.png"))
