"""Parity, against closed forms."""

import math

import numpy as np
import pytest

from rdeploy.errors import InvariantError
from rdeploy.metrics import segmentation
from rdeploy.metrics.outputs import Outputs
from rdeploy.verify import answers, parity


def logits(n=32, classes=10, seed=0):
    return np.random.default_rng(seed).standard_normal((n, classes)).astype(np.float32)


def of(*arrays):
    """Outputs with the pixel decisions that a run keeps of dense ones."""
    dense = segmentation.classes_of(arrays[0]) if arrays[0].ndim == 4 else None
    return Outputs(arrays=arrays, decisions=dense)


def compared(outputs, reference, **more):
    return parity.compare(of(outputs), of(reference), **more)


def test_parity_is_the_closed_form():
    reference = np.array([[3.0, 4.0], [0.0, 5.0]], np.float32)
    outputs = np.array([[3.0, 4.0], [0.5, 5.0]], np.float32)

    found = compared(outputs, reference)

    assert found.max_abs_err == 0.5
    assert found.sqnr_db == pytest.approx(10 * math.log10(50 / 0.25))
    assert found.cosine == pytest.approx(50 / math.sqrt(50 * 50.25))
    assert found.top1_agreement == 1.0
    assert found.samples == 2


def test_parity_does_not_depend_on_the_pieces_that_it_reads(monkeypatch):
    reference = logits(33)
    outputs = reference + 0.1 * logits(33, seed=1)
    whole = compared(outputs, reference)

    monkeypatch.setattr(answers, "_PIECE_BYTES", 200)
    pieces = compared(outputs, reference)

    assert pieces.top1_agreement == pytest.approx(whole.top1_agreement)
    assert (pieces.cosine, pieces.sqnr_db) == pytest.approx((whole.cosine, whole.sqnr_db))
    assert (pieces.max_abs_err, pieces.samples) == (whole.max_abs_err, whole.samples)


def test_identical_and_silent_outputs_have_finite_numbers():
    same = compared(logits(), logits())
    silent = compared(np.zeros((2, 3)), np.zeros((2, 3)))
    noise = compared(np.ones((2, 3)), np.zeros((2, 3)))

    assert (same.sqnr_db, same.max_abs_err) == (parity.SQNR_LIMIT_DB, 0.0)
    assert same.cosine == pytest.approx(1.0)
    assert (silent.cosine, silent.sqnr_db) == (1.0, parity.SQNR_LIMIT_DB)
    assert (noise.cosine, noise.sqnr_db) == (0.0, -parity.SQNR_LIMIT_DB)


def test_half_precision_outputs_do_not_overflow_the_sums():
    big = np.full((4, 1000), 60000.0, np.float16)

    assert compared(big, big).cosine == pytest.approx(1.0)


def test_agreement_within_parity_counts_pixels_of_dense_outputs():
    reference = np.zeros((1, 2, 2, 2))
    reference[:, 1] = 1.0
    outputs = reference.copy()
    outputs[0, 0, 0, 0] = 2.0

    assert compared(outputs, reference).top1_agreement == 0.75


def test_tokens_have_no_top1():
    assert compared(np.ones((2, 3, 4)), np.ones((2, 3, 4))).top1_agreement is None


def test_parity_refuses_what_it_cannot_compare():
    with pytest.raises(InvariantError, match=r"the engine's outputs have shape \(2, 3\), the FP32 variant's \(2, 4\)"):
        compared(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(InvariantError, match="give at least one image"):
        compared(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(InvariantError, match="not defined for outputs with NaN or infinity"):
        compared(np.full((2, 3), np.inf), np.ones((2, 3)))


def test_of_several_outputs_the_worst_one_counts():
    scores, boxes = logits(4), logits(4, seed=1)
    noisy = boxes + np.float32(0.5)

    found = parity.compare(of(scores, noisy), of(scores, boxes))

    assert found.max_abs_err == pytest.approx(0.5, abs=1e-6)
    assert found.sqnr_db == compared(noisy, boxes).sqnr_db
    with pytest.raises(InvariantError, match="the engine has 1 outputs, the FP32 variant 2"):
        parity.compare(of(scores), of(scores, boxes))
