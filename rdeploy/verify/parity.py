"""Compare an engine's outputs with those of the same variant in FP32: what quantize + build cost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from rdeploy.errors import InvariantError
from rdeploy.metrics.outputs import Outputs
from rdeploy.results import Parity
from rdeploy.verify.answers import Array, classes, pieces

SQNR_LIMIT_DB = 200.0
"""Identical outputs have no noise; beyond float32's own precision the ratio says nothing, so it ends here."""


def compare(outputs: Outputs, reference: Outputs, *, task: str = "classification") -> Parity:
    """Compare an engine's outputs with those of the same variant in FP32; of several outputs the worst one counts.

    `sqnr_db` is 10 log10(sum ref^2 / sum (ref - out)^2), within +-200; `top1_agreement` is per image for the (N, C) of a
    classifier, per pixel where there are pixel decisions, else None.

    Raises:
        InvariantError: the shapes differ, or the outputs hold NaN or infinity (`collapse` says so in words).
    """
    if len(outputs.arrays) != len(reference.arrays):
        raise InvariantError(f"the engine has {len(outputs.arrays)} outputs, the FP32 variant {len(reference.arrays)}")
    each = [_parity_of(mine, exact) for mine, exact in zip(outputs.arrays, reference.arrays)]
    return replace(
        each[0],
        max_abs_err=max(one.max_abs_err for one in each),
        cosine=min(one.cosine for one in each),
        sqnr_db=min(one.sqnr_db for one in each),
        top1_agreement=_top1_agreement(outputs, reference, task),
    )


def _parity_of(outputs: Array, reference: Array) -> Parity:
    _check_same_shape(outputs, reference)
    worst, noise, signal, energy, dot = 0.0, 0.0, 0.0, 0.0, 0.0
    for piece in pieces(outputs):
        out, ref = outputs[piece].astype(np.float64), reference[piece].astype(np.float64)
        if not np.isfinite(out).all():
            raise InvariantError("parity is not defined for outputs with NaN or infinity")
        error = ref - out
        worst = max(worst, float(np.abs(error).max(initial=0.0)))
        noise += float(np.vdot(error, error))
        signal += float(np.vdot(ref, ref))
        energy += float(np.vdot(out, out))
        dot += float(np.vdot(ref, out))
    return Parity(
        max_abs_err=worst,
        cosine=_cosine(dot, signal, energy),
        sqnr_db=_decibel(signal, noise),
        top1_agreement=None,
        samples=len(outputs),
    )


def _check_same_shape(outputs: Array, reference: Array) -> None:
    if outputs.shape != reference.shape:
        raise InvariantError(f"the engine's outputs have shape {outputs.shape}, the FP32 variant's {reference.shape}")
    if not len(outputs):
        raise InvariantError("there are no outputs to verify; give at least one image")


def _cosine(dot: float, first: float, second: float) -> float:
    if first == 0.0 and second == 0.0:
        return 1.0
    product = math.sqrt(first) * math.sqrt(second)
    return dot / product if product > 0.0 else 0.0


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return SQNR_LIMIT_DB
    if signal == 0.0:
        return -SQNR_LIMIT_DB
    return min(SQNR_LIMIT_DB, max(-SQNR_LIMIT_DB, 10.0 * math.log10(signal / noise)))


def _top1_agreement(outputs: Outputs, reference: Outputs, task: str) -> float | None:
    if task not in ("classification", "segmentation"):
        return None
    mine, exact = classes(outputs), classes(reference)
    if mine is None or exact is None:
        return None
    return float(
        np.mean([np.mean(mine[piece] == exact[piece]) for piece in (slice(i, i + 1) for i in range(len(mine)))])
    )
