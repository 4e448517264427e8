"""No image chooses and judges, or judges and trains."""

from types import SimpleNamespace

import numpy as np
import pytest

from rdeploy import splits
from rdeploy.data import images
from rdeploy.splits import Split, split_images

FEW = "100 images, 128 are the fewest to choose by and to judge on"


@pytest.fixture
def stock(tmp_path):
    """Arrays of 300, 100 and 600 images, the first with labels."""
    rng = np.random.default_rng(0)
    found = {}
    for name, count in (("labelled", 300), ("few", 100), ("many", 600)):
        pixels = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=pixels, labels=np.arange(count) % 10)
        found[name] = images.collect(tmp_path / f"{name}.npz")
    return found


def build(calib, judged=None, *, training=None, data=None, given="images", task="classification"):
    request = SimpleNamespace(calib=given, data=data, seed=0)
    spec = SimpleNamespace(task=task)
    real = given == "images" or data is not None
    return SimpleNamespace(
        request=request, spec=spec, calib=calib, judged=judged or calib, training=training, has_real_images=real
    )


def parts(split):
    return [set(one.paths) for one in (split.choosing, split.judging, split.training) if one is not None]


def test_without_labels_the_calibration_images_are_halved(stock):
    split = split_images(build(stock["labelled"]))

    choosing, judging = parts(split)
    assert (len(choosing), len(judging)) == (150, 150)
    assert not choosing & judging
    assert (split.labelled, split.chooser_labels) == (False, None)


def test_labelled_images_judge_and_all_others_choose(stock):
    split = split_images(build(stock["many"], stock["labelled"], data="labelled"))

    assert (len(split.choosing), len(split.judging), split.labelled) == (256, 300, True)
    assert split.chooser_labels is None


def test_of_the_same_folder_no_image_does_both(stock):
    split = split_images(build(stock["labelled"], stock["labelled"], data="labelled"))

    choosing, judging = parts(split)
    assert (len(choosing), len(judging)) == (150, 150)
    assert not choosing & judging
    assert split.chooser_labels == split.choosing.labels


def test_training_images_are_neither_chosen_by_nor_judged_on(stock):
    split = split_images(build(stock["few"], training=stock["many"]))

    choosing, judging, training = parts(split)
    assert (len(choosing), len(judging), len(training)) == (64, 64, 472)
    assert len(choosing | judging | training) == 600


def test_what_is_judged_on_is_taken_out_of_the_training_images(stock):
    split = split_images(build(stock["few"], stock["labelled"], training=stock["labelled"], data="labelled"))

    assert split == "0 images to train on that nothing is judged on, 256 are the fewest"


def test_images_that_engines_are_judged_on_are_not_trained_on_without_labels_either(stock):
    held = stock["many"].subset(range(50))

    split = split_images(build(held, training=stock["many"]))

    assert not set(held.paths) & set().union(*parts(split))


@pytest.mark.parametrize(
    ("given", "name", "reason"),
    [
        ("images", "few", FEW),
        ("random", "many", "no images were given to choose by and to judge on"),
        (None, "many", "no images were given to choose by and to judge on"),
    ],
)
def test_where_it_cannot_be_done_it_says_why(stock, given, name, reason):
    assert split_images(build(stock[name], given=given)) == reason


def test_the_same_seed_splits_the_same(stock):
    first, second = (split_images(build(stock["labelled"])) for _ in range(2))

    assert isinstance(first, Split)
    assert first.choosing.paths == second.choosing.paths
    assert splits.LEAST == 128


@pytest.mark.parametrize(("choosing", "judging", "counts"), [(1000, 1000, (150, 150)), (64, 100, (64, 100))])
def test_a_large_network_is_tried_on_fewer_images(stock, choosing, judging, counts):
    split = split_images(build(stock["labelled"], stock["labelled"], data="labelled"))

    found = split.limited(choosing, judging)

    assert (len(found.choosing), len(found.judging)) == counts
    assert found.chooser_labels == found.choosing.labels
    assert set(found.choosing.paths) <= set(split.choosing.paths)
