"""Collapses, of outputs that are broken on purpose."""

import numpy as np
import pytest

from rdeploy.metrics.outputs import Outputs
from rdeploy.types import Limits
from rdeploy.verify import collapse

LIMITS = Limits(min_cosine=0.9, min_sqnr_db=3.0)


def logits(n=32, classes=10, seed=0):
    return np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32)


def of(*arrays):
    return Outputs(arrays=arrays)


def reasons(outputs, reference, limits, **more):
    return collapse.reasons(of(outputs), None if reference is None else of(reference), limits, **more)


def test_good_outputs_have_not_collapsed():
    reference = logits()

    assert reasons(reference + 0.01, reference, LIMITS) == ()
    assert reasons(reference, None, LIMITS) == ()


def test_nan_and_infinity_are_counted_by_image():
    outputs = logits()
    outputs[3, 0], outputs[3, 1], outputs[5, 2] = np.nan, np.inf, -np.inf

    assert reasons(outputs, logits(), LIMITS) == ("NaN or infinity in the outputs of 2 of 32 images",)


@pytest.mark.parametrize("reference", [logits(), None])
def test_a_constant_output_is_a_collapse(reference):
    outputs = np.repeat(logits()[:1], 32, axis=0)

    assert reasons(outputs, reference, LIMITS)[0] == "the output is the same for all 32 images"


def test_a_constant_reference_blames_nobody():
    constant = np.repeat(logits()[:1], 32, axis=0)

    assert reasons(constant, constant, LIMITS) == ()
    assert reasons(logits(1), logits(1), LIMITS) == ()


def test_a_reference_that_differs_by_its_rounding_only_blames_nobody():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 10)).astype(np.float32)
    nearly = of(np.repeat(base, 8, axis=0) * (1 + 1e-4 * rng.normal(size=(8, 10)).astype(np.float32)))

    assert collapse.reasons(of(np.repeat(base, 8, axis=0)), nearly, LIMITS) == ()


def test_one_class_for_everything_is_a_collapse_where_the_reference_has_many():
    reference = logits()
    outputs = reference.copy()
    outputs[:, 7] += 20.0

    (reason,) = reasons(outputs, reference, Limits(min_cosine=-1.0, min_sqnr_db=-100.0))

    assert reason.startswith("100% of the decisions are class 7; in FP32 the most frequent class has ")


def test_one_class_is_fine_where_the_reference_says_so_too():
    reference = logits()
    reference[:, 7] += 20.0

    assert reasons(reference + 0.01 * logits(seed=2), reference, LIMITS) == ()


def test_distance_from_fp32_is_told_with_its_limit():
    reference = logits()
    outputs = reference + 3.0 * logits(seed=1)

    told = reasons(outputs, reference, LIMITS)

    assert told[0].startswith("cosine with FP32 is 0.")
    assert told[0].endswith(", under the limit of 0.9")
    assert told[1].startswith("SQNR against FP32 is -")
    assert told[1].endswith(" dB, under the limit of 3 dB")


def test_one_of_several_outputs_may_be_constant():
    scores, anchors = logits(8), np.ones((8, 4))

    assert collapse.reasons(of(scores, anchors), of(scores, anchors), LIMITS) == ()
    constant = of(np.repeat(scores[:1], 8, axis=0), anchors)
    assert "the output is the same for all 8 images" in collapse.reasons(of(constant.arrays[0]), of(scores), LIMITS)


def test_an_embedding_that_no_longer_tells_images_apart_has_collapsed():
    reference = logits()
    outputs = reference + 100.0

    (reason,) = reasons(outputs, reference, Limits(min_cosine=-1, min_sqnr_db=-99), task="embedding")

    assert reason.startswith("the embeddings of different images are alike: mean cosine 1.000, in FP32 it is ")
