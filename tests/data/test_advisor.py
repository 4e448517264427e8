import numpy as np
import pytest

from rdeploy.data.advisor import advise, near_duplicates, suspect_preprocessing
from rdeploy.data.images import ImageSet
from rdeploy.data.preprocess import normalise
from rdeploy.errors import ConfigError
from rdeploy.types import Preprocessing

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)


def image_set(count, *, labels=None, skipped=()):
    paths = tuple(f"{i}.png" for i in range(count))
    return ImageSet(paths=paths, labels=labels, class_names=(), sha256="", skipped=skipped)


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_nothing_to_say_about_enough_different_images():
    assert advise(image_set(120), noise(120), asked=120) == ()


def test_few_images():
    (said,) = advise(image_set(20), noise(20), asked=256)

    assert said == (
        "20 calibration images (256 asked for): ranges may not cover what the network meets in use; give at least 100"
    )


def test_fewer_than_asked_but_enough():
    assert advise(image_set(120), noise(120), asked=256) == ("120 calibration images, all there are (256 asked for)",)


def test_skipped_images_are_counted():
    said = advise(image_set(120, skipped=(("a.png", "the file is empty"), ("b.png", "x"))), noise(120), asked=120)

    assert said == ("2 images skipped: a.png (the file is empty), ...",)


def test_exact_copies():
    pixels = np.concatenate([noise(90), noise(30)])

    assert advise(image_set(120), pixels, asked=120) == (
        "30 of 120 calibration images are exact copies of others and add nothing",
    )


def test_all_the_same_picture():
    pixels = np.repeat(noise(1), 120, axis=0)

    (said,) = advise(image_set(120), pixels, asked=120)

    assert said.startswith("all 120 calibration images are the same picture")


def test_near_copies():
    base = noise(60)
    shifted = base.copy()
    shifted[:, 0, 0, 0] ^= 1
    pixels = np.concatenate([base, shifted])

    assert near_duplicates(base) == 0
    assert near_duplicates(pixels) == 60
    assert "60 of 120 calibration images look the same as another one" in advise(image_set(120), pixels, asked=120)[0]


def test_some_of_a_single_colour():
    pixels = noise(120)
    pixels[3] = 7

    (said,) = advise(image_set(120), pixels, asked=120)

    assert said == "1 of 120 calibration images are of a single colour and teach nothing"


def test_all_of_a_single_colour():
    pixels = np.zeros((5, 8, 8, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]

    with pytest.raises(ConfigError, match="all 5 calibration images are of a single colour"):
        advise(image_set(5), pixels, asked=5)


def test_no_images():
    with pytest.raises(ConfigError, match="no calibration images"):
        advise(image_set(0), noise(0), asked=5)


def test_one_class_only():
    said = advise(image_set(120, labels=(4,) * 120), noise(120), asked=120)

    assert said == ("all 120 calibration images are of one class: use images of all classes",)


def classifier(pixels, trained_with):
    """A network that knows these very images under one normalisation: class i is the cosine with image i."""
    known = normalise(np.ascontiguousarray(pixels), trained_with).reshape(len(pixels), -1).astype(np.float64)
    known /= np.linalg.norm(known, axis=1, keepdims=True)

    def run(batch):
        return 20 * batch.reshape(len(batch), -1) @ known.T / np.linalg.norm(batch)

    return run


def images_like(trained_with, count=32):
    """Images around the mean that the network was trained with; noise tells each from the others."""
    rng = np.random.default_rng(3)
    colours = np.array(trained_with.mean) * 255 + rng.integers(-45, 46, (count, 1, 1, 3))
    return np.clip(colours + rng.integers(-70, 71, (count, 8, 8, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("declared", [IMAGENET, HALF])
def test_the_right_preprocessing_is_not_suspected(declared):
    pixels = images_like(declared)

    assert suspect_preprocessing(classifier(pixels, declared), pixels, declared) is None


def test_the_wrong_preprocessing_is_suspected_and_the_right_one_named():
    pixels = images_like(IMAGENET)

    said = suspect_preprocessing(classifier(pixels, IMAGENET), pixels, Preprocessing(mean=(0,) * 3, std=(1,) * 3))

    assert said is not None
    assert "the preprocessing may be wrong: with mean 0,0,0 and std 1,1,1" in said
    assert "ImageNet's (--mean 0.485,0.456,0.406" in said


def test_reversed_channels_are_suspected():
    pixels = images_like(HALF)

    said = suspect_preprocessing(classifier(pixels[..., ::-1], HALF), pixels, HALF)

    assert said is not None
    assert "the channels in BGR order" in said


def test_all_but_equal_normalisations_are_not_told_apart():
    pixels = images_like(HALF)
    lite = Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)

    assert suspect_preprocessing(classifier(pixels, HALF), pixels, lite) is None


@pytest.mark.parametrize(
    "run",
    [
        lambda batch: np.zeros((len(batch), 5, 4, 4)),
        lambda batch: np.ones((len(batch), 2)),
        lambda batch: np.full((len(batch), 20), np.nan),
    ],
)
def test_outputs_that_are_no_class_scores_say_nothing(run):
    assert suspect_preprocessing(run, images_like(HALF), HALF) is None


def test_at_most_32_images_are_run():
    calls = []

    def run(batch):
        calls.append(len(batch))
        return np.random.default_rng(0).normal(size=(len(batch), 10))

    suspect_preprocessing(run, images_like(HALF, 100), HALF)

    assert set(calls) == {1}
    assert len(calls) <= 32 * 6
