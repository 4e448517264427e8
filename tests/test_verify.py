"""The judgement of outputs, against closed forms and outputs that are broken on purpose."""

import math

import numpy as np
import pytest

from rdeploy import verify
from rdeploy.errors import ConfigError, InvariantError
from rdeploy.metrics import segmentation
from rdeploy.metrics.intervals import mean_interval, wilson_interval
from rdeploy.metrics.outputs import Outputs
from rdeploy.types import Limits

LIMITS = Limits(min_cosine=0.9, min_sqnr_db=3.0)


def logits(n=32, classes=10, seed=0):
    return np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32)


def of(*arrays, counts=None):
    """Outputs with the pixel decisions that a run keeps of dense ones."""
    dense = segmentation.classes_of(arrays[0]) if arrays[0].ndim == 4 else None
    return Outputs(arrays=arrays, decisions=dense, counts=counts)


def parity(outputs, reference, **more):
    return verify.parity(of(outputs), of(reference), **more)


def collapse(outputs, reference, limits, **more):
    return verify.collapse(of(outputs), None if reference is None else of(reference), limits, **more)


def test_parity_is_the_closed_form():
    reference = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)
    outputs = np.array([[3.0, 4.0], [0.5, 5.0]], np.float32)

    found = parity(outputs, reference)

    assert found.max_abs_err == 0.5
    assert found.sqnr_db == pytest.approx(10 * math.log10(50 / 0.25))
    assert found.cosine == pytest.approx(50 / math.sqrt(50 * 50.25))
    assert found.top1_agreement == 1.0
    assert found.samples == 2


def test_parity_does_not_depend_on_the_pieces_that_it_reads(monkeypatch):
    reference = logits(33)
    outputs = reference + 0.1 * logits(33, seed=1)
    whole = parity(outputs, reference)

    monkeypatch.setattr(verify, "_PIECE_BYTES", 200)
    pieces = parity(outputs, reference)

    assert pieces.top1_agreement == pytest.approx(whole.top1_agreement)
    assert (pieces.cosine, pieces.sqnr_db) == pytest.approx((whole.cosine, whole.sqnr_db))
    assert (pieces.max_abs_err, pieces.samples) == (whole.max_abs_err, whole.samples)


def test_identical_and_silent_outputs_have_finite_numbers():
    same = parity(logits(), logits())
    silent = parity(np.zeros((2, 3)), np.zeros((2, 3)))
    noise = parity(np.ones((2, 3)), np.zeros((2, 3)))

    assert (same.sqnr_db, same.max_abs_err) == (verify.SQNR_LIMIT_DB, 0.0)
    assert same.cosine == pytest.approx(1.0)
    assert (silent.cosine, silent.sqnr_db) == (1.0, verify.SQNR_LIMIT_DB)
    assert (noise.cosine, noise.sqnr_db) == (0.0, -verify.SQNR_LIMIT_DB)


def test_half_precision_outputs_do_not_overflow_the_sums():
    big = np.full((4, 1000), 60000.0, np.float16)

    assert parity(big, big).cosine == pytest.approx(1.0)


def test_agreement_within_parity_counts_pixels_of_dense_outputs():
    reference = np.zeros((1, 2, 2, 2))
    reference[:, 1] = 1.0
    outputs = reference.copy()
    outputs[0, 0, 0, 0] = 2.0

    assert parity(outputs, reference).top1_agreement == 0.75


def test_tokens_have_no_top1():
    assert parity(np.ones((2, 3, 4)), np.ones((2, 3, 4))).top1_agreement is None


def test_parity_refuses_what_it_cannot_compare():
    with pytest.raises(InvariantError, match=r"the engine's outputs have shape \(2, 3\), the FP32 variant's \(2, 4\)"):
        parity(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(InvariantError, match="give at least one image"):
        parity(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(InvariantError, match="not defined for outputs with NaN or infinity"):
        parity(np.full((2, 3), np.inf), np.ones((2, 3)))


def test_accuracy_counts_and_compares_with_the_native_model():
    classes = np.eye(4)
    native = classes[[0, 1, 2, 3]]
    variant = classes[[0, 1, 2, 0]]

    found = verify.accuracy(variant, [0, 1, 2, 3], native)

    assert (found.metric, found.labelled, found.samples) == ("top1", True, 4)
    assert (found.value, found.reference, found.drop) == (0.75, 1.0, 0.25)
    assert found.ci95 == wilson_interval(0.75, 4)


def test_the_native_model_is_its_own_reference():
    found = verify.accuracy(np.eye(2), [0, 0])

    assert (found.value, found.reference, found.drop) == (0.5, 0.5, 0.0)


def test_nan_is_never_a_right_answer():
    outputs = np.array([[np.nan, 0.0], [1.0, 0.0]])

    assert verify.decisions(outputs).tolist() == [-1, 0]
    assert verify.accuracy(outputs, [0, 0]).value == 0.5


def test_one_column_decides_by_its_sign():
    outputs = np.array([[-1.0], [2.0]])

    assert verify.decisions(outputs).tolist() == [0, 1]
    assert verify.accuracy(outputs, [0, 1]).value == 1.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], "1 labels for 2 images; give one label an image"),
        ([0, 9], r"label 9 is not a class of this model \(0 to 2\); check the labels"),
        ([-1, 0], r"label -1 is not a class of this model \(0 to 2\); check the labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        verify.accuracy(np.ones((2, 3)), labels)


def test_labels_need_class_scores():
    with pytest.raises(
        ConfigError, match=r"one row of class scores an image, the model's output has shape \(2, 3, 4, 4\)"
    ):
        verify.accuracy(np.ones((2, 3, 4, 4)), [0, 0])


@pytest.mark.parametrize(
    ("share", "samples", "expected"),
    [(0.0, 10, (0.0, 0.2775)), (1.0, 10, (0.7225, 1.0)), (0.5, 100, (0.4038, 0.5962)), (0.9, 50, (0.7864, 0.9565))],
)
def test_wilson_interval_matches_published_values(share, samples, expected):
    assert wilson_interval(share, samples) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    hits = rng.binomial(60, 0.8, 4000)
    covered = [low <= 0.8 <= high for low, high in (wilson_interval(h / 60, 60) for h in hits)]

    assert 0.93 <= np.mean(covered) <= 0.975
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_agreement_needs_no_labels():
    found = verify.agreement(of(np.eye(4)[[0, 1, 2, 0]]), of(np.eye(4)))

    assert (found.metric, found.value, found.reference, found.drop) == ("agreement", 0.75, 1.0, 0.25)
    assert (found.labelled, found.samples) == (False, 4)


def test_agreement_of_dense_outputs_is_on_the_native_grid_and_counts_images():
    native = np.zeros((2, 2, 4, 4))
    native[:, 1, :, 2:] = 1.0
    small = np.zeros((2, 2, 2, 2))
    small[:, 1, :, 1:] = 1.0
    small[1, 1, 0, 0] = 1.0

    found = verify.agreement(of(small), of(native), "segmentation")

    assert found.value == (1.0 + 0.75) / 2
    assert found.ci95 == mean_interval(np.array([1.0, 0.75]))


def test_agreement_refuses_other_classes():
    with pytest.raises(InvariantError, match=r"outputs \(2, 3\) do not fit the native model's \(2, 4\)"):
        verify.agreement(of(np.ones((2, 3))), of(np.ones((2, 4))))


def test_good_outputs_have_not_collapsed():
    reference = logits()

    assert collapse(reference + 0.01, reference, LIMITS) == ()
    assert collapse(reference, None, LIMITS) == ()


def test_nan_and_infinity_are_counted_by_image():
    outputs = logits()
    outputs[3, 0], outputs[3, 1], outputs[5, 2] = np.nan, np.inf, -np.inf

    assert collapse(outputs, logits(), LIMITS) == ("NaN or infinity in the outputs of 2 of 32 images",)


@pytest.mark.parametrize("reference", [logits(), None])
def test_a_constant_output_is_a_collapse(reference):
    outputs = np.repeat(logits()[:1], 32, axis=0)

    assert collapse(outputs, reference, LIMITS)[0] == "the output is the same for all 32 images"


def test_a_constant_reference_blames_nobody():
    constant = np.repeat(logits()[:1], 32, axis=0)

    assert collapse(constant, constant, LIMITS) == ()
    assert collapse(logits(1), logits(1), LIMITS) == ()


def test_one_class_for_everything_is_a_collapse_where_the_reference_has_many():
    reference = logits()
    outputs = reference.copy()
    outputs[:, 7] += 20.0

    (reason,) = collapse(outputs, reference, Limits(min_cosine=-1.0, min_sqnr_db=-100.0))

    assert reason.startswith("100% of the decisions are class 7; in FP32 the most frequent class has ")


def test_one_class_is_fine_where_the_reference_says_so_too():
    reference = logits()
    reference[:, 7] += 20.0

    assert collapse(reference + 0.01 * logits(seed=2), reference, LIMITS) == ()


def test_distance_from_fp32_is_told_with_its_limit():
    reference = logits()
    outputs = reference + 3.0 * logits(seed=1)

    reasons = collapse(outputs, reference, LIMITS)

    assert reasons[0].startswith("cosine with FP32 is 0.")
    assert reasons[0].endswith(", under the limit of 0.9")
    assert reasons[1].startswith("SQNR against FP32 is -")
    assert reasons[1].endswith(" dB, under the limit of 3 dB")


def test_judge_puts_everything_together():
    reference = logits()
    labels = reference.argmax(axis=1).tolist()

    found = verify.judge(
        of(reference + 0.01),
        reference=of(reference),
        native=of(reference),
        labels=labels,
        limits=LIMITS,
        executed_by="fake 1",
    )

    assert found.passed
    assert found.executed_by == "fake 1"
    assert found.parity.max_abs_err == pytest.approx(0.01, abs=1e-6)
    assert found.accuracy.value == found.agreement.value == 1.0


def test_judge_of_broken_outputs_has_reasons_and_no_parity():
    outputs = np.full((4, 3), np.nan)

    found = verify.judge(of(outputs), reference=of(np.ones((4, 3))), native=of(np.ones((4, 3))), labels=[0, 0, 0, 0])

    assert not found.passed
    assert found.parity is None
    assert found.accuracy.value == 0.0
    assert found.agreement.value == 0.0


def test_judge_of_tokens_compares_with_fp32_only():
    tokens = np.random.default_rng(0).standard_normal((4, 5, 6))

    found = verify.judge(of(tokens), reference=of(tokens), native=of(tokens), labels=[0, 0, 0, 0])

    assert found.passed
    assert (found.accuracy, found.agreement) == (None, None)


def test_of_several_outputs_the_worst_one_counts():
    scores, boxes = logits(4), logits(4, seed=1)
    noisy = boxes + np.float32(0.5)

    found = verify.parity(of(scores, noisy), of(scores, boxes))

    assert found.max_abs_err == pytest.approx(0.5, abs=1e-6)
    assert found.sqnr_db == parity(noisy, boxes).sqnr_db
    with pytest.raises(InvariantError, match="the engine has 1 outputs, the FP32 variant 2"):
        verify.parity(of(scores), of(scores, boxes))


def test_one_of_several_outputs_may_be_constant():
    scores, anchors = logits(8), np.ones((8, 4))

    assert verify.collapse(of(scores, anchors), of(scores, anchors), LIMITS) == ()
    constant = of(np.repeat(scores[:1], 8, axis=0), anchors)
    assert "the output is the same for all 8 images" in verify.collapse(of(constant.arrays[0]), of(scores), LIMITS)


def test_embeddings_agree_by_their_cosine_with_the_native_model():
    native = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    outputs = np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0]])

    found = verify.judge(of(outputs), task="embedding", native=of(native), labels=[0, 1, 1])

    assert found.accuracy is None
    assert (found.agreement.metric, found.agreement.labelled) == ("cosine", False)
    assert found.agreement.value == pytest.approx((1 + 2**-0.5 + 1) / 3)
    assert found.agreement.drop == pytest.approx(1 - found.agreement.value)


def test_embeddings_have_no_top1_and_no_classes_to_collapse_to():
    reference = logits()
    outputs = reference.copy()
    outputs[:, 7] += 20.0

    found = verify.judge(
        of(outputs), task="embedding", reference=of(reference), limits=Limits(min_cosine=-1, min_sqnr_db=-99)
    )

    assert found.parity.top1_agreement is None
    assert not any("class" in reason for reason in found.reasons)


def test_an_embedding_that_no_longer_tells_images_apart_has_collapsed():
    reference = logits()
    outputs = reference + 100.0

    (reason,) = collapse(outputs, reference, Limits(min_cosine=-1, min_sqnr_db=-99), task="embedding")

    assert reason.startswith("the embeddings of different images are alike: mean cosine 1.000, in FP32 it is ")


def test_segmentation_is_scored_by_its_counts():
    counts = np.array([[[8, 0], [8, 2], [10, 0]], [[5, 5], [5, 5], [5, 5]]])
    scores = np.zeros((2, 2, 1, 1))

    found = verify.judge(of(scores, counts=counts), task="segmentation", native=of(scores, counts=counts[[1, 1]]))

    assert (found.accuracy.metric, found.accuracy.samples, found.accuracy.labelled) == ("miou", 2, True)
    assert found.accuracy.value == pytest.approx((13 / 15 + 5 / 7) / 2)
    assert (found.accuracy.reference, found.accuracy.drop) == (1.0, pytest.approx(1 - found.accuracy.value))
    assert found.agreement.value == 1.0
