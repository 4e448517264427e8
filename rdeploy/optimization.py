"""`rdeploy optimize`: the loop around the line. A request and a budget go in; the front, the pick and their bundles come out.

Cheap first. Every resolution is judged in FP32 on a few images, then on more; what loses too much, or costs more than something
surely better, is out before an engine is built. Then engines are built and measured briefly, the most hopeful first by models
of latency and loss fitted on those measured so far, a few at a time and always beside the native model, until none that is
left could enter the front, which is measured again at length. Only what was measured is reported.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rdeploy import (
    adaptation,
    choosing,
    cluster,
    drawing,
    environment,
    judging,
    pipeline,
    prospects,
    rounds,
    sampling,
    search,
    serde,
    space,
)
from rdeploy.choosing import Choice
from rdeploy.compare import Row
from rdeploy.errors import RdeployError, Unsupported
from rdeploy.intake import Build, take_in
from rdeploy.pipeline import engines, outcome
from rdeploy.prospects import Prospects
from rdeploy.results import BuildResult
from rdeploy.rounds import Search
from rdeploy.run_store import RunStore
from rdeploy.runs import OUTCOME
from rdeploy.search import Budget, Candidate, Evidence, Interval, Point, Way
from rdeploy.search_request import SearchRequest
from rdeploy.standing import Watch, Watcher
from rdeploy.types import QuantOptions, Variant

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeResult:
    """What a search found: the choice, the front, all that was measured, what was ruled out unmeasured, and the bundles.

    `ruled_out` has variants, out whatever their latency is, points, of which something measured is as good, and precisions
    and backends that cannot be searched here.
    """

    choice: Choice
    front: tuple[Evidence, ...]
    measured: tuple[Evidence, ...]
    ruled_out: tuple[tuple[str, str], ...]
    failures: tuple[tuple[str, str], ...]
    unfinished: tuple[str, ...]
    """Points that the time budget left unmeasured although they might have entered the front."""
    result: BuildResult


def optimize(
    request: SearchRequest, *, progress: Callable[[str], None] | None = None, watch: Watch | None = None
) -> OptimizeResult:
    """Search the resolutions, precisions and backends of a target for the best point under a budget.

    Bundles of the front, `run.sqlite` and `outcome.json` are written to the request's `out`.

    Raises:
        ConfigError: the request, the images or the model are wrong, or `out` holds another run.
        MissingDependency: none of the target's backends is installed, or Ray or Optuna is not where they are asked for.
        StageError: the native model itself cannot be exported, built or run.
    """
    deadline = time.monotonic() + (request.time_budget_s or math.inf)
    cluster.require(request.workers)
    sampling.require(request.samples)
    this, notes = take_in(request.build, progress or log.info)
    store = RunStore(Path(request.build.out))
    store.belongs_to(_facts(request, this), resume=request.resume)
    native = Variant(resolution=this.spec.native_resolution)
    baseline = pipeline.run_variant(this, native, reference=None)
    outputs = engines.native_outputs(this, baseline)
    with cluster.join(request.workers, this, baseline, outputs) as crew:
        one = Search(
            this=this,
            budget=request.budget,
            store=store,
            deadline=deadline,
            baseline=baseline,
            native_outputs=outputs,
            crew=crew,
            watcher=Watcher(watch, request.budget, deadline=deadline),
            left_out={**dict(request.left_out), **space.left_out(this, baseline)},
        )
        try:
            candidates = [*_float_candidates(one, ladder=request.ladder), *_rounded_candidates(one)]
            left = _measure_all(one, candidates)
            if request.samples and not one.late():
                _measure_samples(one, request.samples)
        finally:
            store.release()
        found = _finish(one, candidates, left, (*notes, *pipeline.advice.batches(this.target, one.batches)))
    this.steps.store.prune(pipeline.CACHE_BYTES)
    return found


def _facts(request: SearchRequest, this: Build) -> dict[str, str]:
    """Return what decides the findings of a run, each by its name: all but the time that it may take, and where it lies."""
    facts = {
        "options": [replace(request.build, command="", out=""), request.budget, request.ladder],
        "model": this.spec.sha256,
        "calibration images": this.calib.sha256,
        "judged images or their labels": [this.judged.sha256, this.judged.labels],
        "images to train on": this.training and [this.training.sha256, this.training.labels],
        "target profile": this.target,
        **{f"this machine's {name}": value for name, value in environment.stable()},
    }
    return {name: serde.digest(value) for name, value in facts.items()}


def _float_candidates(one: Search, *, ladder: bool) -> list[Candidate]:
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


def _rounded_candidates(one: Search) -> list[Candidate]:
    """Return the candidates of the other precisions: those of FP32 that are left, expected to lose no less.

    The INT8 or FP16 form of a resolution cannot be expected to be better than its FP32 form, so the optimistic end of its loss
    is that of FP32; how much worse it is, is found when it is built.
    """
    request = one.this.request
    precisions = [p for p in request.precisions if p != "fp32" and p not in one.left_out]
    quant, found = _quant(one), []
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


def _quant(one: Search) -> QuantOptions:
    request = one.this.request
    return QuantOptions(recipe=request.recipe, calibrator=request.calibrator, samples=request.calib_samples)


def _measure_samples(one: Search, samples: int) -> None:
    quant = _quant(one) if "int8" in one.this.request.precisions and "int8" not in one.left_out else None
    try:
        drawing.measure_samples(one, samples, quant)
    except (
        Unsupported
    ) as error:  # none of the places that are left merges tokens: what was measured counts all the same
        one.left_out["samples"] = str(error)


def _measure_all(one: Search, candidates: Sequence[Candidate]) -> tuple[Point, ...]:
    """Build and measure the hopeful points, round by round; return those that the time budget left out.

    The native model is measured however late it is: what was found is compared with it, and it is an answer. Points that
    another process is at are waited for: they may rule out others, or lapse with their process.
    """
    while True:
        measured, elsewhere = one.store.evidence(), one.store.elsewhere()
        failed = one.store.failures()
        hopes = _hopeful(one, candidates, measured)
        points = [point for point in hopes.promising() if point.id not in failed]
        one.watcher.tell(measured, points=len(points), variants=len({point.variant for point in points}))
        native = [point for point in points if point.variant == one.baseline.variant]
        if not points or (one.late() and (measured or not native)):
            return tuple(points)
        free = [point for point in points if point.id not in elsewhere]
        if len(free) < len(points) and not (measured and free):
            time.sleep(rounds.LOOK_S)
            continue
        chosen = native if one.late() else hopes.foremost(_next(one, free, candidates, measured))
        taken = [point for point in chosen if one.store.claim(point.id)]
        one.crew.begin(point.variant for point in taken)
        one.crew.begin(list(dict.fromkeys(p.variant for p in free if p not in chosen))[: one.crew.size])
        rounds.measure(one, taken)


def _hopeful(one: Search, candidates: Sequence[Candidate], measured: Sequence[Evidence]) -> Prospects:
    """Return what can be expected of the unmeasured points; where none can satisfy the budget, of those nearest to it too."""
    found = _prospects(one, candidates, measured, one.budget)
    if found.promising() or not measured or choosing.choose(measured, one.budget).pick is not None:
        return found
    return _prospects(one, candidates, measured, replace(one.budget, max_drop=None, max_latency_ms=None))


def _prospects(one: Search, candidates: Sequence[Candidate], measured: Sequence[Evidence], budget: Budget) -> Prospects:
    """Return what can be expected of the points that were asked for; the native model is measured whatever was asked."""
    precisions, native = one.this.request.precisions, one.baseline.variant
    wanted = {c.variant for c in candidates if c.variant == native or c.variant.precision in precisions}
    return Prospects(candidates, one.ways, measured, budget, wanted=wanted)


def _next(
    one: Search, points: Sequence[Point], candidates: Sequence[Candidate], measured: Sequence[Evidence]
) -> list[Point]:
    """Return the points of the next few variants, one of each place of which nothing was measured: it tells of the others.

    At first those of the native size, in every precision, on every backend and at every batch size: they tell how these
    compare. In FP32 alone the smallest goes with it.
    """
    native = one.baseline.variant
    variants = list(dict.fromkeys(point.variant for point in points))
    known = {native.at, *(e.variant.at for e in measured)}
    first_there = {variant.at: variant for variant in reversed(variants)}
    chosen = [v for v in variants if v.at in known or v is first_there[v.at]][: one.at_once]
    if not measured:
        chosen = [variant for variant in variants if variant.place == native.place]
        if chosen == [native] and len(variants) > 1:
            macs = {candidate.variant: candidate.macs for candidate in candidates}
            chosen.append(min(variants, key=lambda variant: macs[variant]))
    return [point for point in points if point.variant in chosen]


def _finish(
    one: Search, candidates: Sequence[Candidate], left: Sequence[Point], notes: tuple[str, ...]
) -> OptimizeResult:
    """Measure the front once more in one interleaved run, choose by that, and write the bundles."""
    measured = one.store.evidence()
    choice = choosing.choose(measured, one.budget)
    finalists = [*search.front(measured), *filter(None, (choice.pick, choice.second))]
    batches = {e.point.batch for e in finalists}
    wanted: dict[Variant, set[Way]] = {one.baseline.variant: set()}
    for e in finalists:
        wanted.setdefault(e.variant, set()).update((e.point.backend, batch) for batch in batches)
    also = wanted.pop(one.baseline.variant)
    made = [(rounds.row(one, variant, {name for name, _ in ways}), ways) for variant, ways in wanted.items()]
    timed = rounds.side_by_side(
        one, [(row, ways) for row, ways in made if isinstance(row, Row)], also=also, layers=True
    )
    for (_, batch), row in timed.items():
        for backend in row.results:
            rounds.settle(one, Point(variant=row.variant, backend=backend, batch=batch), row)
    measured = one.store.evidence()
    # Only what this one run measured side by side is compared: an older latency of another point could enter by noise.
    compared = {(row.variant.id, backend, batch) for (_, batch), row in timed.items() for backend in row.results}
    finalists = [e for e in measured if (e.variant.id, *e.point.way) in compared]
    choice, front = choosing.choose(finalists, one.budget, everything=measured), search.front(finalists)
    # One batch size for all that is compared in the bundles and the report: the pick's.
    batch = next((e.point.batch for e in (choice.pick, *front) if e is not None), one.batches[0])
    rows = [row for (name, at), row in timed.items() if at == batch and row.variant != one.baseline.variant]
    failures = one.store.failures()
    out = one.left_out | {name: reason for name, (_, reason) in one.store.candidates().items() if reason}
    out |= _prospects(one, candidates, measured, one.budget).reasons()
    found = OptimizeResult(
        choice=choice,
        front=front,
        measured=measured,
        ruled_out=tuple((name, reason) for name, reason in out.items() if name not in failures),
        failures=tuple(failures.items()),
        unfinished=tuple(point.id for point in left),
        result=outcome.finish(
            one.this, one.natives.get(batch, one.baseline), [(row.variant, row) for row in rows], notes
        ),
    )
    _write_outcome(Path(one.this.request.out), found)
    return found


def _write_outcome(folder: Path, found: OptimizeResult) -> None:
    content = {
        "pick": found.choice.pick.point.id if found.choice.pick else None,
        "second": found.choice.second.point.id if found.choice.second else None,
        "reason": found.choice.reason,
        "front": [one.point.id for one in found.front],
        "measured": serde.to_json(found.measured),
        "ruled_out": dict(found.ruled_out),
        "failures": dict(found.failures),
        "unfinished": list(found.unfinished),
    }
    temporary = folder / f".{OUTCOME}-{uuid.uuid4().hex}"  # another process may be at it too
    temporary.write_text(serde.dumps(content), encoding="utf-8")
    temporary.replace(folder / OUTCOME)
