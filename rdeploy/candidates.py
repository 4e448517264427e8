"""Which variants may be worth an engine: a search's space goes in; candidates come out, judged in FP32, the rest with reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rdeploy import adaptation, choosing, judging, pipeline, prospects, search, space
from rdeploy.errors import RdeployError
from rdeploy.rounds import Search
from rdeploy.search import Candidate, Interval
from rdeploy.types import QuantOptions, Variant


def judged(one: Search, *, ladder: bool) -> list[Candidate]:
    """Judge every place and resolution in FP32, on more and more images, and drop what is surely out."""
    native = one.baseline.variant
    wanted = filter(None, (_settled(one, variant) for variant in space.grid(one.this, ladder=ladder)))
    variants = list({variant.id: variant for variant in (native, *wanted, native)}.values())
    found: list[Candidate] = []
    for count in judging.rounds(len(one.this.judged), one.baseline.cost.macs):
        one.crew.judge(variants, count)
        found = list(_judged_downwards(one, variants, count))
        out = prospects.ruled_out(found, one.budget, native=native, final=count == len(one.this.judged))
        for candidate in found:
            one.store.keep_candidate(candidate, ruled_out=out.get(candidate.variant.id, ""))
        found = [c for c in found if c.variant.id not in out]
        variants = [c.variant for c in found]
        if one.late():
            break
    return found


def _judged_downwards(one: Search, variants: Sequence[Variant], count: int) -> Iterator[Candidate]:
    """Judge each place from its largest size down; below one that surely loses too much nothing is judged.

    A size above the native one tells nothing of those below: a network answers best at the size that it was trained for.
    """
    native = one.this.spec.native_resolution
    lost: dict[str, str] = {}
    seen: list[Candidate] = []
    for variant in search.downwards(variants):
        if variant.at in lost and variant != one.baseline.variant:
            one.store.keep_candidate(_unknown(variant), ruled_out=f"not judged: {lost[variant.at]}")
            continue
        candidate = _judged_float(one, variant, count)
        if candidate is None:
            continue
        yield candidate
        seen.append(candidate)
        out = prospects.beyond(candidate, seen, one.budget, final=count == len(one.this.judged))
        if out and not search.enlarges(variant, native):
            lost[variant.at] = f"{variant.id}, which is larger, loses {search.points_text(candidate.drop)}"


def _settled(one: Search, variant: Variant) -> Variant | None:
    try:
        return adaptation.adapted(one.this, pipeline.settled_variant(one.this, variant)[0])[0]
    except RdeployError as error:
        one.store.keep_candidate(_unknown(variant), ruled_out=str(error))
        return None


def _unknown(variant: Variant) -> Candidate:
    return Candidate(variant=variant, macs=0, drop=Interval(value=math.nan, low=math.nan, high=math.nan), images=0)


def _judged_float(one: Search, variant: Variant, count: int) -> Candidate | None:
    """Return what the FP32 graph of a variant costs and loses on `count` images."""
    try:
        found = judging.judge(one.this, one.baseline, variant, count)
    except RdeployError as error:
        one.store.keep_candidate(_unknown(variant), ruled_out=str(error))
        return None
    if variant == one.baseline.variant or found.verification is None:
        drop = Interval(value=0.0, low=0.0, high=0.0)
        return Candidate(variant=variant, macs=found.cost.macs, drop=drop, images=count)
    return Candidate(
        variant=variant,
        macs=found.cost.macs,
        drop=judging.drop_of(found.verification),
        images=count,
        changed=judging.changed_of(found.verification),
        samples=judging.labels_of(found.verification),
    )


def rounded(one: Search) -> list[Candidate]:
    """Return the candidates of the other precisions: those of FP32 that are left, expected to lose no less.

    The INT8 or FP16 form of a resolution cannot be expected to be better than its FP32 form, so the optimistic end of its loss
    is that of FP32; how much worse it is, is found when it is built.
    """
    request = one.this.request
    precisions = [p for p in request.precisions if p != "fp32" and p not in one.left_out]
    quant, found = quant_of(one), []
    for candidate, out in one.store.candidates().values():
        if out or candidate.variant.precision != "fp32":
            continue
        for precision in precisions:
            variant = replace(
                candidate.variant,
                precision=precision,
                quant=quant if precision == "int8" else None,
                embeds_preprocessing=request.embed_preprocess,  # the native FP32 model alone stays as it is
            )
            found.append(replace(candidate, variant=variant))
            one.store.keep_candidate(found[-1])
    return found


def mixed(one: Search, judged: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates in INT8 with the worst layers in float: of places whose INT8 form was found too lossy, and FP32's is not.

    Finding the layers takes many times as long as INT8 alone: they come last, and only where INT8 is faster than the best so far.
    """
    measured, limit = one.store.evidence(), one.budget.max_drop
    if limit is None or not one.this.has_real_images or one.this.spec.task == "detection":
        return []
    best = choosing.choose(measured, one.budget).pick
    exact = {c.variant.place: c for c in judged if c.variant.precision == "fp32"}
    found: dict[str, Candidate] = {}
    for e in measured:
        form = exact.get(e.variant.place)
        if e.variant.precision != "int8" or form is None or not form.drop.value < limit < e.drop.value:
            continue
        if best is None or e.ms_per_image < best.ms_per_image:
            quant = replace(quant_of(one), max_drop=limit - max(0.0, form.drop.value))
            variant = replace(e.variant, precision="mixed", quant=quant)
            found[variant.id] = replace(form, variant=variant)
            one.store.keep_candidate(found[variant.id])
    return list(found.values())


def quant_of(one: Search) -> QuantOptions:
    request = one.this.request
    return QuantOptions(recipe=request.recipe, calibrator=request.calibrator, samples=request.calib_samples)
