"""What judging makes of verifications and of image sets; the loop of a search runs in tests/e2e/test_optimize.py."""

import math

import pytest

from rdeploy import judging
from rdeploy.data.images import ImageSet
from rdeploy.results import Accuracy, Verification


def labelled(value, reference, samples=400):
    return Accuracy(
        metric="top1", value=value, reference=reference, drop=reference - value, ci95=(value - 0.05, value + 0.05),
        samples=samples, labelled=True,
    )  # fmt: skip


def agreed(value, samples=400):
    return Accuracy(
        metric="agreement", value=value, reference=1.0, drop=1 - value, ci95=(value - 0.02, value + 0.01),
        samples=samples, labelled=False,
    )  # fmt: skip


def test_without_labels_the_loss_is_the_share_of_changed_decisions():
    found = judging.drop_of(Verification(passed=True, agreement=agreed(0.95)))

    assert (found.value, found.low, found.high) == pytest.approx((5.0, 4.0, 7.0))


def test_with_labels_only_changed_decisions_widen_the_interval():
    few = judging.drop_of(Verification(passed=True, accuracy=labelled(0.88, 0.90), agreement=agreed(0.97)))
    many = judging.drop_of(Verification(passed=True, accuracy=labelled(0.88, 0.90), agreement=agreed(0.80)))

    changed = (0.03 * 400 + 1) / 402  # closed form, Agresti and Min
    assert few.value == pytest.approx(2.0)
    assert few.high - few.value == pytest.approx(196 * math.sqrt((changed - 0.02**2) / 402))
    assert many.high - many.low > 2 * (few.high - few.low)


def test_a_variant_that_decides_as_the_native_model_does_still_has_an_interval():
    found = judging.drop_of(Verification(passed=True, accuracy=labelled(0.9, 0.9), agreement=agreed(1.0)))

    assert found.value == 0
    assert found.low < 0 < found.high < 1


def test_the_native_model_itself_loses_nothing():
    found = judging.drop_of(Verification(passed=True))

    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_subset_is_spread_evenly_and_has_a_name_of_its_own():
    images = ImageSet(
        paths=tuple("abcdefghij"), labels=tuple(range(10)), class_names=(), sha256="s", masks=tuple("ABCDEFGHIJ")
    )

    found = judging.subset(images, 4)

    assert found.paths == ("a", "c", "f", "h")
    assert found.labels == (0, 2, 5, 7)
    assert found.masks == ("A", "C", "F", "H")
    assert found.sha256 != "s"
    assert judging.subset(images, 10) is images


def test_each_round_takes_four_times_the_images_and_the_last_takes_all():
    assert list(judging.rounds(2500, 4_000_000_000)) == [128, 512, 2048, 2500]
    assert list(judging.rounds(20, 4_000_000_000)) == [20]


def test_a_small_network_is_judged_on_as_many_images_as_take_no_longer_than_exporting_it():
    assert list(judging.rounds(2500, 100_000_000)) == [1000, 2500]
    assert list(judging.rounds(2500, 0)) == [2500]
