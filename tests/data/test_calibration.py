import dataclasses

import numpy as np
import pytest

from rdeploy.data import calibration, preprocess
from rdeploy.data.calibration import NormalisedImages, collect_calibration, stand_in_images
from rdeploy.errors import ConfigError
from rdeploy.store import Store
from rdeploy.types import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="net",
    source="net",
    sha256="",
    native_resolution=(16, 24),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0),
)

FUNCTIONS = """
import numpy as np

def many():
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)

def none():
    return []

def broken():
    raise RuntimeError("the disk is gone")
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_images.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return "my_images"


def collect(what, tmp_path, limit=8):
    return collect_calibration(what, limit=limit, seed=0, store=Store(tmp_path / "cache"), spec=SPEC)


def test_images_are_normalised_one_by_one(tmp_path):
    pixels = np.zeros((3, 16, 24, 3), np.uint8)
    pixels[1] = 255
    np.save(tmp_path / "pixels.npy", pixels)

    images = NormalisedImages(tmp_path / "pixels.npy", SPEC)

    assert len(images) == 3
    assert images[0].shape == (1, 3, 16, 24)
    np.testing.assert_allclose([images[0].max(), images[1].min()], [-2, 2])
    assert len(images[1:]) == 2
    assert len(list(images)) == 3
    with pytest.raises(IndexError):
        images[3]


def test_a_functions_images_are_taken_up_to_the_limit(functions, tmp_path):
    images = collect(f"{functions}:many", tmp_path)

    assert len(images) == 8
    assert images.read(0).shape == (16, 24, 3)


def test_a_functions_images_are_cropped_once(functions, tmp_path):
    cropping = dataclasses.replace(SPEC.preprocessing, crop_pct=0.8)
    spec = dataclasses.replace(SPEC, preprocessing=cropping)
    store = Store(tmp_path / "cache")

    images = collect_calibration(f"{functions}:many", limit=1, seed=0, store=store, spec=spec)
    (found,) = preprocess.prepare(images, (16, 24), cropping)

    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(found, preprocess.to_pixels(image, (16, 24), cropping))


def test_the_same_images_have_the_same_hash(functions, tmp_path):
    assert collect(f"{functions}:many", tmp_path).sha256 == collect(f"{functions}:many", tmp_path).sha256
    assert collect(f"{functions}:many", tmp_path).sha256 != collect(f"{functions}:many", tmp_path, limit=7).sha256


def test_a_function_without_images_is_refused(functions, tmp_path):
    with pytest.raises(ConfigError, match="--calib my_images:none: the function gave no images"):
        collect(f"{functions}:none", tmp_path)


def test_what_a_function_raises_is_what_the_user_hears(functions, tmp_path):
    with pytest.raises(ConfigError, match="--calib my_images:broken: RuntimeError: the disk is gone"):
        collect(f"{functions}:broken", tmp_path)


def test_a_missing_module_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="--calib no_such_module:images: ModuleNotFoundError"):
        collect("no_such_module:images", tmp_path)


def test_random_images_are_seeded_and_have_the_models_shape(tmp_path):
    first, second = collect("random", tmp_path), collect("random", tmp_path)

    assert len(first) == 8
    assert first.sha256 == second.sha256
    assert first.read(0).shape == (16, 24, 3)
    assert stand_in_images(SPEC, seed=1, store=Store(tmp_path / "cache")).sha256 != first.sha256


@pytest.mark.parametrize(("what", "is_path"), [("photos", True), ("random", False), ("pkg.mod:fn", False)])
def test_a_path_is_told_from_a_function(what, is_path):
    assert calibration.is_path(what) == is_path
