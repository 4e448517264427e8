import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="the networks of these tests are PyTorch's")

from rdeploy.adapt import Choosing, preprocessing  # noqa: E402

from .conftest import PLAIN, network, subject  # noqa: E402

BEST = dataclasses.replace(PLAIN, crop_pct=0.95, interpolation="lanczos")


class Marked:
    """Pixels that tell how far a preprocessing is from `BEST`; every request is written down."""

    def __init__(self, count=64):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def pixels(self, preprocessings, rows):
        self.asked.append((len(preprocessings), len(rows)))
        return [np.full((len(rows), 2, 2, 3), self.distance(one), np.uint8) for one in preprocessings]

    @staticmethod
    def distance(one):
        filters = {("lanczos", True): 0, ("bicubic", True): 5, ("bilinear", True): 20, ("box", True): 30}
        return filters.get((one.interpolation, one.antialias), 40) + round(100 * abs(one.crop_pct - BEST.crop_pct))


def run(pixels):
    """Answer class 0 the more surely the nearer the preprocessing is."""
    distance = pixels[:, 0, 0, 0].astype(np.float32)
    yield [np.stack([5 - distance / 10, np.zeros_like(distance)], axis=1)]


def marked(**more):
    one = subject(network(), network())
    native = [np.array([5.0, 0.0], np.float32)] * 64
    return dataclasses.replace(one, run=run, choosing=Choosing(pictures=Marked(), native=native), **more)


def test_crop_and_filter_are_found_together():
    change = preprocessing.apply(marked(), preprocessing.Options())

    assert change.preprocessing == BEST
    assert change.detail == "crop 0.95 instead of 0.875, lanczos instead of bilinear"
    assert change.state is None


def test_all_are_tried_on_few_images_and_the_better_ones_on_more():
    one = marked()

    preprocessing.apply(one, preprocessing.Options())

    assert one.choosing.pictures.asked == [(35, 32), (10, 64)]  # 7 crops x 5 filters; a quarter, and what the model has


def test_a_dense_answer_keeps_its_frame_and_only_the_filter_is_searched():
    change = preprocessing.apply(marked(sees_crop=False), preprocessing.Options())

    assert change.preprocessing == dataclasses.replace(BEST, crop_pct=PLAIN.crop_pct)


def test_nothing_is_proposed_where_the_models_own_is_best():
    assert preprocessing.apply(marked(preprocessing=BEST), preprocessing.Options()) is None


def test_at_the_native_size_there_is_nothing_to_choose():
    one = marked(resolution=(16, 16))

    assert preprocessing.unsupported(one, preprocessing.Options()) == "the network is given images of its native size"
    assert preprocessing.unsupported(marked(), preprocessing.Options()) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_pct": 0.9}, "crop 0.9 instead of 0.875"),
        ({"antialias": False}, "bilinear without antialiasing instead of bilinear"),
        ({"interpolation": "box", "antialias": False}, "box instead of bilinear"),
    ],
)
def test_it_says_what_is_different(change, said):
    assert preprocessing.described(dataclasses.replace(PLAIN, **change), PLAIN) == said
