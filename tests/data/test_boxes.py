"""Images and YOLO label files, found together or refused in words."""

import numpy as np
import pytest
from PIL import Image

from rdeploy.data import boxes
from rdeploy.errors import ConfigError


@pytest.fixture
def streets(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "labels/a.txt").write_text("2 0.5 0.5 0.5 1.0\n0 0.25 0.5 0.5 0.5\n")
    (tmp_path / "labels/b.txt").write_text("")
    return tmp_path


def test_boxes_are_corners_relative_to_the_image(streets):
    found = boxes.collect_boxed(str(streets))

    assert [path.split("/")[-1] for path in found.paths] == ["a.png", "b.png"]
    assert boxes.read_boxes(found.boxes[0]).tolist() == [[0.25, 0.0, 0.75, 1.0, 2.0], [0.0, 0.25, 0.5, 0.75, 0.0]]
    assert boxes.read_boxes(found.boxes[1]).shape == (0, 5)
    assert len(boxes.collect_boxed(str(streets), limit=1)) == 1


def test_what_holds_no_boxes_is_refused(streets):
    with pytest.raises(ConfigError, match="holds no images with boxes: give a folder with images/ and labels/"):
        boxes.collect_boxed(str(streets / "images"))
    (streets / "labels/a.txt").write_text("1 0.5 0.5\n")
    with pytest.raises(ConfigError, match="a.txt has a line that is not five numbers"):
        boxes.collect_boxed(str(streets))
    (streets / "labels/a.txt").write_text("cat 0.5\n")
    with pytest.raises(ConfigError, match="a.txt could not be read: could not convert string to float: 'cat'"):
        boxes.collect_boxed(str(streets))
    for file in (streets / "labels").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="none of the 3 images of .* has a label file"):
        boxes.collect_boxed(str(streets))
