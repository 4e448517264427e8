"""Which images are shown, what is written about them, and where nothing is."""

import base64
import io
import json

import numpy as np
from PIL import Image

from rdeploy import disagreements
from rdeploy.data.images import ImageSet


def logits(*rows):
    return np.array(rows, np.float32)


def images(tmp_path, count=3):
    paths = []
    for index in range(count):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (400, 200), (40 * index, 10, 10)).save(path)
        paths.append(str(path))
    return ImageSet(paths=tuple(paths), labels=tuple(range(count)), class_names=(), sha256="s")


def written(tmp_path, mine, theirs, **options):
    np.save(tmp_path / "mine.npy", mine)
    np.save(tmp_path / "theirs.npy", theirs)
    pixels = np.full((len(mine), 20, 40, 3), 128, np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    file = tmp_path / "out" / "d.json"
    found = disagreements.write(
        file,
        images(tmp_path, len(mine)),
        tmp_path / "mine.npy",
        tmp_path / "theirs.npy",
        **{"names": ("cat", "dog"), "task": "classification", "pixels": tmp_path / "pixels.npy", **options},
    )
    return found, file


def test_the_surest_disagreement_comes_first_and_agreements_not_at_all():
    mine = logits([2, 0], [5, 0], [0, 1], [1, 0])
    theirs = logits([0, 2], [0, 5], [0, 9], [0, 1])

    assert disagreements.worst(mine, theirs) == [1, 0, 3]
    assert disagreements.worst(mine, theirs, most=1) == [1]


def test_an_entry_says_who_decided_what_and_shows_a_small_picture(tmp_path):
    found, file = written(tmp_path, logits([3, 0], [0, 1], [0, 9]), logits([0, 3], [0, 1], [0, 9]))

    (entry,) = json.loads(file.read_text())
    assert found
    assert (entry["name"], entry["native"], entry["variant"], entry["label"]) == (
        "0.png",
        "dog 95 %",
        "cat 95 %",
        "cat",
    )
    assert Image.open(io.BytesIO(base64.b64decode(entry["jpeg"]))).size == (160, 80)


def test_classes_without_a_name_have_their_number(tmp_path):
    _, file = written(tmp_path, logits([3, 0]), logits([0, 3]), names=())

    assert json.loads(file.read_text())[0]["native"] == "class 1 95 %"


def test_without_a_disagreement_or_a_classifier_nothing_is_written(tmp_path):
    same, file = written(tmp_path, logits([3, 0]), logits([3, 0]))
    dense, _ = written(tmp_path, np.zeros((1, 2, 4, 4), np.float32), np.ones((1, 2, 4, 4), np.float32))

    assert (same, dense) == (False, False)
    assert not file.exists()


def test_what_an_earlier_build_wrote_goes_where_there_is_none_now(tmp_path):
    _, file = written(tmp_path, logits([3, 0]), logits([0, 3]))
    assert file.exists()

    written(tmp_path, logits([3, 0]), logits([3, 0]))

    assert not file.exists()


def test_a_segmentation_shows_both_maps_side_by_side_where_the_most_pixels_differ(tmp_path):
    maps = np.zeros((3, 2, 4), np.int16)
    np.save(tmp_path / "theirs.decisions.npy", maps)
    maps[0, 0, 0] = maps[2, :, :3] = 1
    np.save(tmp_path / "mine.decisions.npy", maps)
    scores = np.zeros((3, 2, 2, 4), np.float32)

    _, file = written(tmp_path, scores, scores, task="segmentation")

    first, second = json.loads(file.read_text())
    assert (first["name"], first["native"], first["variant"]) == (
        "2.png",
        "cat 100 %",
        "dog 75 %, cat 25 %; 75 % differ",
    )
    assert second["name"] == "0.png"
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["jpeg"])))).astype(int)
    assert picture.shape == (20, 84, 3)
    assert np.abs(picture[10, 10] - picture[10, 54]).max() > 20  # another class, another colour
    assert np.abs(picture[10, 35] - picture[10, 79]).max() < 20


def test_a_detector_shows_both_sets_of_boxes(tmp_path):
    box = [1, 1, 9, 9, 0.9, 0]
    np.save(tmp_path / "theirs.detections.npy", np.array([[0, *box], [1, *box]], np.float32))
    np.save(tmp_path / "mine.detections.npy", np.array([[0, *box], [1, *box], [1, 20, 2, 30, 9, 0.8, 1]], np.float32))
    rows = np.zeros((2, 5, 3), np.float32)

    _, file = written(tmp_path, rows, rows, task="detection")

    (entry,) = json.loads(file.read_text())
    assert (entry["name"], entry["native"], entry["variant"]) == ("1.png", "1 cat", "1 cat, 1 dog; 33 % differ")


def test_an_embedding_decides_nothing(tmp_path):
    found, file = written(tmp_path, logits([3, 0]), logits([0, 3]), task="embedding")

    assert not found
    assert not file.exists()


def test_probabilities_of_large_logits_are_finite():
    assert disagreements.probabilities(np.array([1e4, 0.0], np.float32)).tolist() == [1.0, 0.0]
