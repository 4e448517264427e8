"""Whether a variant is fit for use: a build's result goes in, a verdict with its numbers comes out for each variant. Pure.

`dominated`: another variant (or the native model) is no slower and loses no more. `needs fine-tuning`: it loses more than a
deployment can be expected to bear. Else `usable`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdeploy import manifest
from rdeploy.adapted import Usability
from rdeploy.results import Accuracy, BuildResult, EngineResult, Result, Verification
from rdeploy.types import ModelSpec

BEARABLE_LABELLED = 2.0
"""Points of accuracy that a lower resolution may cost: what the authors of the usual networks lose from 224 to 160."""
BEARABLE_CHANGED = 5.0
"""The same where there are no labels, in per cent of the decisions: most of those that change were wrong or doubtful before."""
_FASTER = 0.97
_LESS = 0.5
"""Under three per cent of the latency and half a point nothing dominates: the next run may say otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What an engine loses against the native model, in points, with its 95 % interval."""

    drop: float
    ci95: tuple[float, float]
    labelled: bool
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """A row's best engine: how fast it is (infinity where it was not measured) and what it loses."""

    row: Result
    name: str
    p50_ms: float
    loss: Loss


def points_lost(verification: Verification | None) -> Loss | None:
    """Return what was lost; None where nothing was compared with the native model.

    With labels the interval is that of a paired difference: found by resampling (mIoU, mAP), or else by the images on which
    variant and native model decide otherwise. Only these can be won or lost, so their share bounds its variance (Agresti and
    Min 2005, with their half observation added). Without labels the loss is the share of decisions that changed.
    """
    labelled, agreed = (verification.accuracy, verification.agreement) if verification else (None, None)
    if labelled is not None:
        half = 0.0 if agreed is None else _paired_half_width(labelled, agreed)
        low, high = labelled.drop_ci95 or (labelled.drop - half, labelled.drop + half)
        return Loss(drop=100 * labelled.drop, ci95=(100 * low, 100 * high), labelled=True, samples=labelled.samples)
    if agreed is not None:
        low, high = agreed.ci95
        return Loss(
            drop=100 * agreed.drop, ci95=(100 * (1 - high), 100 * (1 - low)), labelled=False, samples=agreed.samples
        )
    return None


def judge(result: BuildResult) -> BuildResult:
    """Return the result with a verdict on every variant that was compared with the native model and passed verification."""
    standings = [one for row in result.variants if (one := _standing(row)) is not None]
    if not standings:
        return result
    native = _native(result.baseline, standings[0].loss)
    found = {one.name: _verdict(one, [native, *standings], result.spec) for one in standings}
    return replace(result, variants=tuple(replace(row, usability=found.get(row.variant.id)) for row in result.variants))


def _paired_half_width(labelled: Accuracy, agreed: Accuracy) -> float:
    samples = labelled.samples + 2
    changed = ((1 - agreed.value) * labelled.samples + 1) / samples
    return 1.96 * math.sqrt(max(changed - labelled.drop**2, 1 / samples) / samples)


def _standing(row: Result) -> _Standing | None:
    passed = [one for one in manifest.ranked(row) if not manifest.failed(one)]
    best: EngineResult | None = manifest.top(row) or next(iter(passed), None)
    loss = points_lost(best.verification) if best is not None else None
    if best is None or loss is None:
        return None
    return _Standing(row=row, name=row.variant.id, p50_ms=manifest.p50_ms(best.measurement), loss=loss)


def _native(baseline: Result, like: Loss) -> _Standing:
    best = manifest.top(baseline)
    nothing = replace(like, drop=0.0, ci95=(0.0, 0.0))
    return _Standing(
        row=baseline, name="native", p50_ms=manifest.p50_ms(best.measurement if best else None), loss=nothing
    )


def _verdict(one: _Standing, others: Sequence[_Standing], spec: ModelSpec) -> Usability:
    loss, task = one.loss, spec.task
    nothing = Usability(verdict="usable", reason="", drop=loss.drop, ci95=loss.ci95, labelled=loss.labelled)
    better = [other for other in others if _dominates(other, one)]
    if better:
        best = min(better, key=lambda other: (other.loss.drop, other.p50_ms))
        reason = (
            f"{best.name} takes {best.p50_ms:.2f} ms and loses {best.loss.drop:.1f} points, this {one.p50_ms:.2f} ms and "
            f"{loss.drop:.1f}"
        )
        return replace(nothing, verdict="dominated", reason=reason, by=best.name)
    bearable = BEARABLE_LABELLED if loss.labelled else BEARABLE_CHANGED
    if loss.drop <= bearable:
        return replace(nothing, reason=_said(loss, task))
    reason = f"{_said(loss, task)}, more than {bearable:g}; {_advice(one, others, bearable, spec)}"
    return replace(nothing, verdict="needs fine-tuning", reason=reason)


def _dominates(other: _Standing, one: _Standing) -> bool:
    if other.name == one.name or not math.isfinite(one.p50_ms) or other.loss.labelled != one.loss.labelled:
        return False
    no_worse = other.p50_ms <= one.p50_ms and other.loss.drop <= one.loss.drop
    return no_worse and (other.p50_ms < _FASTER * one.p50_ms or other.loss.drop < one.loss.drop - _LESS)


def _said(loss: Loss, task: str) -> str:
    low, high = loss.ci95
    if loss.labelled:
        return f"loses {loss.drop:.1f} points [{low:.1f}, {high:.1f}] on {loss.samples} labelled images"
    what = {"segmentation": "the pixels", "detection": "the boxes"}.get(task, "the decisions")
    if task == "embedding":
        return f"is {loss.drop:.1f} points [{low:.1f}, {high:.1f}] of cosine away from the native model on {loss.samples} images"
    return f"changes {loss.drop:.1f} % [{low:.1f}, {high:.1f}] of {what} on {loss.samples} images"


def _advice(one: _Standing, others: Sequence[_Standing], bearable: float, spec: ModelSpec) -> str:
    """Say what to do about a loss: by what was tried already, and by where it comes from."""
    variant = one.row.variant
    twin = next(
        (
            o
            for o in others
            if o.row.variant.place == variant.place and o.row.variant.precision == "fp32" and o is not one
        ),
        None,
    )
    if twin is not None and twin.loss.drop <= bearable:
        return f"FP32 at this resolution loses {twin.loss.drop:.1f}, so it is {variant.precision.upper()} that costs: --max-drop"
    trained = [rung for rung in one.row.adaptation.rungs if rung.step == "distill"] if one.row.adaptation else []
    if trained:
        what = "it was fine-tuned" if trained[0].kept else "fine-tuning was tried and gained nothing"
        return f"{what}: more images or epochs, or a higher resolution"
    if spec.task == "detection" or spec.source.endswith(".onnx"):
        return "train the original model at this resolution, or take a higher one"
    return "fine-tune it with --finetune DIR, or take a higher resolution"
