"""The verdict on one engine: what is judged together, by task."""

import numpy as np
import pytest

from rdeploy import verify
from rdeploy.metrics import segmentation
from rdeploy.metrics.outputs import Outputs
from rdeploy.types import Limits

LIMITS = Limits(min_cosine=0.9, min_sqnr_db=3.0)


def logits(n=32, classes=10, seed=0):
    return np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32)


def of(*arrays, counts=None):
    """Outputs with the pixel decisions that a run keeps of dense ones."""
    dense = segmentation.classes_of(arrays[0]) if arrays[0].ndim == 4 else None
    return Outputs(arrays=arrays, decisions=dense, counts=counts)


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


def test_segmentation_is_scored_by_its_counts():
    counts = np.array([[[8, 0], [8, 2], [10, 0]], [[5, 5], [5, 5], [5, 5]]])
    scores = np.zeros((2, 2, 1, 1))

    found = verify.judge(of(scores, counts=counts), task="segmentation", native=of(scores, counts=counts[[1, 1]]))

    assert (found.accuracy.metric, found.accuracy.samples, found.accuracy.labelled) == ("miou", 2, True)
    assert found.accuracy.value == pytest.approx((13 / 15 + 5 / 7) / 2)
    assert (found.accuracy.reference, found.accuracy.drop) == (1.0, pytest.approx(1 - found.accuracy.value))
    assert found.agreement.value == 1.0
