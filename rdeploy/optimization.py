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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rdeploy import (
    candidates,
    choosing,
    cluster,
    drawing,
    environment,
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
from rdeploy.errors import Unsupported
from rdeploy.intake import Build, take_in
from rdeploy.pipeline import engines, outcome
from rdeploy.prospects import Prospects
from rdeploy.results import BuildResult
from rdeploy.rounds import Search
from rdeploy.run_store import RunStore
from rdeploy.runs import OUTCOME
from rdeploy.search import Budget, Candidate, Evidence, Point, Way
from rdeploy.search_request import SearchRequest
from rdeploy.standing import Watch, Watcher
from rdeploy.types import Variant

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
    notes = (*pipeline.advice.expected(this, native), *notes)
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
            found = [*candidates.judged(one, ladder=request.ladder), *candidates.rounded(one)]
            left = _measure_all(one, found)
            if not one.late() and (more := candidates.mixed(one, found)):
                left = _measure_all(one, found := [*found, *more])
            if request.samples and not one.late():
                _measure_samples(one, request.samples)
        finally:
            store.release()
        result = _finish(one, found, left, (*notes, *pipeline.advice.batches(this.target, one.batches)))
    this.steps.store.prune(pipeline.CACHE_BYTES)
    return result


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


def _measure_samples(one: Search, samples: int) -> None:
    """Measure what is drawn; where there is nothing to draw after all, what was measured counts all the same."""
    quant = candidates.quant_of(one) if "int8" in one.this.request.precisions and "int8" not in one.left_out else None
    try:
        drawing.measure_samples(one, samples, quant)
    except Unsupported as error:
        one.left_out["samples"] = str(error)


def _measure_all(one: Search, judged: Sequence[Candidate]) -> tuple[Point, ...]:
    """Build and measure the hopeful points, round by round; return those that the time budget left out.

    The native model is measured however late it is: what was found is compared with it, and it is an answer. Points that
    another process is at are waited for: they may rule out others, or lapse with their process.
    """
    while True:
        measured, elsewhere = one.store.evidence(), one.store.elsewhere()
        failed = one.store.failures()
        hopes = _hopeful(one, judged, measured)
        points = [point for point in hopes.promising() if point.id not in failed]
        one.watcher.tell(measured, points=len(points), variants=len({point.variant for point in points}))
        native = [point for point in points if point.variant == one.baseline.variant]
        if not points or (one.late() and (measured or not native)):
            return tuple(points)
        free = [point for point in points if point.id not in elsewhere]
        if len(free) < len(points) and not (measured and free):
            time.sleep(rounds.LOOK_S)
            continue
        chosen = native if one.late() else hopes.foremost(_next(one, free, judged, measured))
        taken = [point for point in chosen if one.store.claim(point.id)]
        one.crew.begin(point.variant for point in taken)
        one.crew.begin(list(dict.fromkeys(p.variant for p in free if p not in chosen))[: one.crew.size])
        rounds.measure(one, taken)


def _hopeful(one: Search, judged: Sequence[Candidate], measured: Sequence[Evidence]) -> Prospects:
    """Return what can be expected of the unmeasured points; where none can satisfy the budget, of those nearest to it too."""
    found = _prospects(one, judged, measured, one.budget)
    if found.promising() or not measured or choosing.choose(measured, one.budget).pick is not None:
        return found
    return _prospects(one, judged, measured, replace(one.budget, max_drop=None, max_latency_ms=None))


def _prospects(one: Search, judged: Sequence[Candidate], measured: Sequence[Evidence], budget: Budget) -> Prospects:
    """Return what can be expected of the points that were asked for; the native model is measured whatever was asked."""
    precisions, native = one.this.request.precisions, one.baseline.variant
    wanted = {c.variant for c in judged if c.variant == native or c.variant.precision in (*precisions, "mixed")}
    return Prospects(judged, one.ways, measured, budget, wanted=wanted)


def _next(
    one: Search, points: Sequence[Point], judged: Sequence[Candidate], measured: Sequence[Evidence]
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
            macs = {candidate.variant: candidate.macs for candidate in judged}
            chosen.append(min(variants, key=lambda variant: macs[variant]))
    return [point for point in points if point.variant in chosen]


def _finish(one: Search, judged: Sequence[Candidate], left: Sequence[Point], notes: tuple[str, ...]) -> OptimizeResult:
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
    if choice.pick is None and (told := _within_reach(one, measured)):
        choice = replace(choice, reason=f"{choice.reason}; {told}")
    # One batch size for all that is compared in the bundles and the report: the pick's.
    batch = next((e.point.batch for e in (choice.pick, *front) if e is not None), one.batches[0])
    native = one.natives.get(batch, one.baseline)
    rows = [row for (name, at), row in timed.items() if at == batch and row.variant != one.baseline.variant]
    if any(e.variant == native.variant for e in (choice.pick, choice.second, *front) if e is not None):
        rows.append(native)  # it is an answer like any other
    failures = one.store.failures()
    out = one.left_out | {name: reason for name, (_, reason) in one.store.candidates().items() if reason}
    out |= _prospects(one, judged, measured, one.budget).reasons()
    found = OptimizeResult(
        choice=choice,
        front=front,
        measured=measured,
        ruled_out=tuple((name, reason) for name, reason in out.items() if name not in failures),
        failures=tuple(failures.items()),
        unfinished=tuple(point.id for point in left),
        result=outcome.finish(one.this, native, [(row.variant, row) for row in rows], notes),
    )
    _write_outcome(Path(one.this.request.out), found, [candidate for candidate, _ in one.store.candidates().values()])
    return found


def _within_reach(one: Search, measured: Sequence[Evidence]) -> str:
    """Say what a larger drop would allow, by the variants that were judged and ruled out, in each precision that is searched."""
    judged = [c for c, out in one.store.candidates().values() if out and c.images and c.variant.precision == "fp32"]
    precisions = [precision for precision in one.this.request.precisions if precision not in one.left_out]
    forms = [replace(c, variant=replace(c.variant, precision=precision)) for c in judged for precision in precisions]
    return prospects.within_reach(forms, one.ways, measured, one.budget)


def _write_outcome(folder: Path, found: OptimizeResult, candidates: Sequence[Candidate]) -> None:
    content = {
        "pick": found.choice.pick.point.id if found.choice.pick else None,
        "second": found.choice.second.point.id if found.choice.second else None,
        "reason": found.choice.reason,
        "front": [one.point.id for one in found.front],
        "bundles": [Path(row.bundle).name for row in found.result.variants if row.bundle],
        "measured": serde.to_json(found.measured),
        "judged": serde.to_json([one for one in candidates if one.images and one.variant.precision == "fp32"]),
        "ruled_out": dict(found.ruled_out),
        "failures": dict(found.failures),
        "unfinished": list(found.unfinished),
    }
    temporary = folder / f".{OUTCOME}-{uuid.uuid4().hex}"  # another process may be at it too
    temporary.write_text(serde.dumps(content), encoding="utf-8")
    temporary.replace(folder / OUTCOME)
