"""Which images a network is fine-tuned on, and what is refused before any work is done."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rdeploy import intake
from rdeploy.errors import ConfigError


def model(*, task="classification", labels=(), onnx=None, classes=3):
    return SimpleNamespace(onnx=onnx, spec=SimpleNamespace(task=task, labels=labels), answers=lambda: classes)


def arrays(folder, count=400, *, labelled=True):
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    if labelled:
        np.savez(folder / "images.npz", images=pixels, labels=np.arange(count) % 3)
        return str(folder / "images.npz")
    np.save(folder / "images.npy", pixels)
    return str(folder / "images.npy")


def test_labels_are_taken_where_they_are_class_numbers(tmp_path):
    assert intake._training(arrays(tmp_path), model()).labels[:4] == (0, 1, 2, 0)


def test_no_labels_are_needed(tmp_path):
    found = intake._training(arrays(tmp_path, labelled=False), model())

    assert (len(found), found.labels) == (400, None)


@pytest.mark.parametrize(
    ("folders", "names", "kept"),
    [
        (("ant", "bee"), ("ant", "bee"), True),
        (("ant", "bee"), (), False),  # in which order the model has them is not known
        (("ant", "bee"), ("cat", "dog", "eel"), False),
        (("0", "1"), (), True),
    ],
)
def test_class_folders_are_labels_only_where_they_are_the_models_classes(folders, names, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "FEWEST_TO_TRAIN", 2)
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "a.png")

    found = intake._training(str(tmp_path), model(labels=names))

    assert (found.labels is not None) == kept


@pytest.mark.parametrize("names", [(), ("ant", "bee")])
def test_labels_that_are_no_class_of_the_network_are_refused(names, tmp_path):
    with pytest.raises(
        ConfigError, match="class 2 is none of the model's 2, which count from 0 to 1: name the folders"
    ):
        intake._training(arrays(tmp_path), model(labels=names, classes=2))


def test_masks_are_no_pictures_to_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "FEWEST_TO_TRAIN", 2)
    for name in ("images/aachen/a.png", "images/bonn/b.png", "masks/aachen/a.png", "masks/bonn/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)

    found = intake._training(str(tmp_path), model(task="segmentation"))

    assert [Path(path).relative_to(tmp_path).parts[0] for path in found.paths] == ["images", "images"]
    assert [Path(path).relative_to(tmp_path).parts[0] for path in found.masks] == ["masks", "masks"]
    assert found.labels is None
    (tmp_path / "masks/bonn/b.png").unlink()
    assert (
        intake._training(str(tmp_path), model(task="segmentation")).masks is None
    )  # an image without one is still worth it


def test_folders_are_no_classes_of_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "FEWEST_TO_TRAIN", 2)
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / folder / "a.png")

    assert intake._training(str(tmp_path), model(task="embedding")).labels is None


@pytest.mark.parametrize(
    ("change", "count", "message"),
    [
        (
            {"onnx": Path("net.onnx")},
            400,
            "finetune needs the PyTorch model: net.onnx is an ONNX file, which is not trained",
        ),
        ({"task": "detection"}, 400, "finetune is for classification, segmentation and embeddings"),
        ({}, 100, "100 images are too few, 384 are the least and thousands are what it takes"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(change, count, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        intake._training(arrays(tmp_path, count), model(**change))
