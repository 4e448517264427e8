"""`rdeploy optimize`: the loop around the line. A request and a budget go in; the front, the pick and their bundles come out.

Cheap first. Every resolution is judged in FP32 on a few images, then on twice as many, and so on; what surely loses too much,
or costs more than something surely better, is out before an engine is built. What is left is quantized and judged. Then
engines are built and measured, the most hopeful first by a latency fitted on those measured so far, a few at a time and always
beside the native model, until none that is left could enter the front. Only what was measured is reported.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rdeploy import adaptation, pipeline, search, serde, usability
from rdeploy.compare import Row, measure_rows
from rdeploy.data.images import ImageSet
from rdeploy.errors import RdeployError
from rdeploy.intake import Build, take_in
from rdeploy.manifest import failed, p50_ms
from rdeploy.pipeline import engines, outcome
from rdeploy.results import BuildResult, EngineResult, Failure, Verification
from rdeploy.run_store import RunStore
from rdeploy.runs import OUTCOME
from rdeploy.search import Budget, Candidate, Choice, Evidence, Interval, Point
from rdeploy.search_request import SearchRequest
from rdeploy.types import QuantOptions, Variant

log = logging.getLogger(__name__)

FIRST_IMAGES = 48
"""How many images the first round of judging takes; each further round takes twice as many."""
AT_ONCE = 3
"""How many variants are measured together, beside the native model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeResult:
    """What a search found: the choice, the front, all that was measured, what was ruled out unmeasured, and the bundles."""

    choice: Choice
    front: tuple[Evidence, ...]
    measured: tuple[Evidence, ...]
    ruled_out: tuple[tuple[str, str], ...]
    failures: tuple[tuple[str, str], ...]
    unfinished: tuple[str, ...]
    """Points that the time budget left unmeasured although they might have entered the front."""
    result: BuildResult


Watch = Callable[[Sequence[Evidence], int], None]
"""Called after each round with what was measured, and how many points are left that could still enter the front."""


@dataclass(slots=True)
class _Search:
    """One run of the loop: what it works with, when it has to end, and the rows that it has built."""

    this: Build
    budget: Budget
    store: RunStore
    deadline: float
    baseline: Row
    native_outputs: Path | None
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def backends(self) -> tuple[str, ...]:
        """Those whose engines can be measured on this machine."""
        return tuple(name for name, built in self.baseline.built.items() if built.not_run is None)

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def optimize(
    request: SearchRequest, *, progress: Callable[[str], None] | None = None, watch: Watch | None = None
) -> OptimizeResult:
    """Search the resolutions, precisions and backends of a target for the best point under a budget.

    Bundles of the front, `run.sqlite` and `outcome.json` are written to the request's `out`.

    Raises:
        ConfigError: the request, the images or the model are wrong, or `out` holds another run.
        MissingDependency: none of the target's backends is installed.
        StageError: the native model itself cannot be exported, built or run.
    """
    started = time.monotonic()
    store = RunStore(Path(request.build.out))
    store.belongs_to(_key(request), resume=request.resume)
    this, notes = take_in(request.build, progress or log.info)
    native = Variant(resolution=this.spec.native_resolution)
    baseline = pipeline.run_variant(this, native, reference=None)
    one = _Search(
        this=this,
        budget=request.budget,
        store=store,
        deadline=started + (request.time_budget_s or math.inf),
        baseline=baseline,
        native_outputs=engines.native_outputs(this, baseline),
    )
    try:
        candidates = [*_float_candidates(one), *_rounded_candidates(one)]
        left = _measure_all(one, candidates, watch or (lambda measured, left: None))
    finally:
        store.release()
    return _finish(one, left, notes)


def _key(request: SearchRequest) -> str:
    """Return what makes two requests the same run: everything but the time that they may take."""
    return serde.digest([replace(request.build, command="", out=""), request.budget])


def _float_candidates(one: _Search) -> list[Candidate]:
    """Judge every place and resolution in FP32, on more and more images, and drop what is surely out."""
    variants = [one.baseline.variant, *filter(None, (_settled(one, v) for v in _grid(one.this)))]
    variants = list({variant.id: variant for variant in variants}.values())
    found: list[Candidate] = []
    for count in _rounds(len(one.this.judged)):
        found = [c for v in variants if (c := _judged_float(one, v, count))]
        out = search.ruled_out(found, one.budget)
        for candidate in found:
            one.store.keep_candidate(candidate, ruled_out=out.get(candidate.variant.id, ""))
        found = [c for c in found if c.variant.id not in out]
        variants = [c.variant for c in found]
        if one.late():
            break
    return found


def _grid(this: Build) -> list[Variant]:
    """Return every FP32 variant of the space: the places asked for, at the sizes asked for or else at a ladder of sizes."""
    request = this.request
    if not request.resolutions and request.scales in ((), (1.0,)):
        request = replace(request, scales=(), resolutions=search.resolutions(this.spec.native_resolution)[1:])
    return pipeline.variants(replace(this, request=replace(request, precisions=("fp32",))))


def _rounds(images: int) -> Iterator[int]:
    count = FIRST_IMAGES
    while count < images:
        yield count
        count *= 2
    yield images


def _settled(one: _Search, variant: Variant) -> Variant | None:
    try:
        return adaptation.adapted(one.this, pipeline.settled_variant(one.this, variant)[0])[0]
    except RdeployError as error:
        one.store.keep_candidate(_unknown(variant), ruled_out=str(error))
        return None


def _unknown(variant: Variant) -> Candidate:
    return Candidate(variant=variant, macs=0, drop=Interval(value=math.nan, low=math.nan, high=math.nan), images=0)


def _judged_float(one: _Search, variant: Variant, count: int) -> Candidate | None:
    """Run the FP32 graph of a variant over `count` images and return what it costs and loses."""
    few = _subset(one.this.judged, count)
    try:
        native = engines.native_outputs(replace(one.this, judged=few), one.baseline)
        cost, found = engines.float_quality(one.this, variant, native, judged=few)
    except RdeployError as error:
        one.store.keep_candidate(_unknown(variant), ruled_out=str(error))
        return None
    native_itself = variant == one.baseline.variant or found is None
    drop = Interval(value=0.0, low=0.0, high=0.0) if native_itself or found is None else drop_of(found)
    return Candidate(variant=variant, macs=cost.macs, drop=drop, images=count)


def _subset(images: ImageSet, count: int) -> ImageSet:
    """Return `count` of the images, evenly spread, so that class folders are all there."""
    if count >= len(images):
        return images
    return images.subset([index * len(images) // count for index in range(count)])


def drop_of(verification: Verification) -> Interval:
    """Return how many points a variant loses, with an interval.

    It is `usability.points_lost`; nothing where the native model was compared with nothing.
    """
    lost = usability.points_lost(verification)
    if lost is None:
        return Interval(value=0.0, low=0.0, high=0.0)  # the native model itself
    return Interval(value=lost.drop, low=lost.ci95[0], high=lost.ci95[1])


def _rounded_candidates(one: _Search) -> list[Candidate]:
    """Return the candidates of the other precisions: those of FP32 that are left, expected to lose no less.

    The INT8 or FP16 form of a resolution cannot be expected to be better than its FP32 form, so the optimistic end of its loss
    is that of FP32; how much worse it is, is found when it is built.
    """
    precisions = [p for p in one.this.target.precisions if p != "fp32" and p in one.this.request.precisions]
    request = one.this.request
    quant = QuantOptions(recipe=request.recipe, calibrator=request.calibrator, samples=request.calib_samples)
    found = []
    for candidate, out in one.store.candidates().values():
        if out or candidate.variant.precision != "fp32":
            continue
        for precision in precisions:
            variant = replace(candidate.variant, precision=precision, quant=quant if precision == "int8" else None)
            found.append(replace(candidate, variant=variant))
            one.store.keep_candidate(found[-1])
    return found


def _measure_all(one: _Search, candidates: Sequence[Candidate], watch: Watch) -> tuple[Point, ...]:
    """Build and measure the hopeful points, round by round; return those that the time budget left out."""
    tried: set[str] = set()
    while True:
        measured = one.store.evidence()
        failures = one.store.failures()
        points = [
            point
            for point in search.promising(candidates, one.backends, measured, one.budget)
            if point.id not in tried and point.id not in failures
        ]
        watch(measured, len(points))
        if not points or one.late():
            return tuple(points)
        chosen = _next(points, candidates, first=not measured)
        taken = [point for point in chosen if one.store.claim(point.id)]
        tried |= {point.id for point in chosen}
        _measure(one, taken)


def _next(points: Sequence[Point], candidates: Sequence[Candidate], *, first: bool) -> list[Point]:
    """Return the points of the next few variants; at first those that the latency model is fitted best on: the extremes."""
    variants = list(dict.fromkeys(point.variant for point in points))
    if first:
        macs = {candidate.variant: candidate.macs for candidate in candidates}
        ordered = sorted(variants, key=lambda v: (v.precision, -macs[v]))
        by_precision = [[v for v in ordered if v.precision == p] for p in dict.fromkeys(v.precision for v in ordered)]
        chosen = list(dict.fromkeys(v for group in by_precision for v in (group[0], group[-1])))
    else:
        chosen = variants[:AT_ONCE]
    return [point for point in points if point.variant in chosen]


def _measure(one: _Search, points: Sequence[Point]) -> None:
    """Build, verify and measure points beside the native model, and write down what was found."""
    rows: dict[str, Row] = {}
    for variant in dict.fromkeys(point.variant for point in points):
        made = _row(one, variant)
        if isinstance(made, Failure):
            for point in (p for p in points if p.variant == variant):
                one.store.settle(point.id, None, failure=f"{made.stage}: {made.message}")
        else:
            rows[variant.id] = made
    if not rows:
        return
    wanted = {name: {p.backend for p in points if p.variant.id == name} for name in rows}
    measured = {
        name: row if row is one.baseline else replace(row, results=_only(row.results, wanted[name]))
        for name, row in rows.items()
    }
    measure_rows(one.this, [one.baseline, *(row for row in measured.values() if row is not one.baseline)])
    for point in (p for p in points if p.variant.id in rows):
        _settle(one, point, measured[point.variant.id])


def _only(results: dict[str, EngineResult], backends: set[str]) -> dict[str, EngineResult]:
    return {name: found for name, found in results.items() if name in backends}


def _settle(one: _Search, point: Point, row: Row) -> None:
    found = row.results.get(point.backend)
    problem = _problem(found)
    evidence = None if problem or found is None else _evidence(one, point, row, found)
    one.store.settle(point.id, evidence, failure=problem)


def _row(one: _Search, variant: Variant) -> Row | Failure:
    if variant == one.baseline.variant:
        return one.baseline
    if variant.id not in one.rows:
        made = pipeline.contained(one.this, variant, one.native_outputs)
        if isinstance(made, Failure):
            return made
        one.rows[variant.id] = made
    return one.rows[variant.id]


def _problem(found: EngineResult | None) -> str:
    if found is None:
        return "no engine was built for this backend"
    if found.failure is not None:
        return f"{found.failure.stage}: {found.failure.message}"
    if failed(found):
        return "; ".join(found.verification.reasons) if found.verification else "verification failed"
    return "" if found.measurement else "built, but its hardware is not here: nothing was measured"


def _evidence(one: _Search, point: Point, row: Row, found: EngineResult) -> Evidence:
    """Return what was measured; the latency is the native model's first one over the speed-up: rounds can be compared."""
    assert found.measurement is not None  # `_problem` has asked
    assert found.engine is not None
    native, compared = Point(variant=one.baseline.variant, backend=point.backend), found.comparison
    measured = p50_ms(found.measurement)
    latency = Interval(value=measured, low=measured, high=measured)
    if compared is not None:
        known = next((e.latency_ms.value for e in one.store.evidence() if e.point == native), None)
        reference = known or p50_ms(one.baseline.results[point.backend].measurement)
        low, high = compared.speedup_ci95
        latency = Interval(value=reference / compared.speedup, low=reference / high, high=reference / low)
    return Evidence(
        point=point,
        macs=row.exported.cost.macs,
        drop=Interval(value=0, low=0, high=0)
        if row is one.baseline or not found.verification
        else drop_of(found.verification),
        latency_ms=latency,
        throughput_ips=1000.0 * found.measurement.batch / latency.value,
        memory_bytes=found.measurement.memory.process_peak,
        size_bytes=found.engine.size_bytes,
    )


def _finish(one: _Search, left: Sequence[Point], notes: tuple[str, ...]) -> OptimizeResult:
    """Measure the front once more in one interleaved run, choose by that, and write the bundles."""
    front = search.front(one.store.evidence())
    choice = search.choose(one.store.evidence(), one.budget)
    wanted = {e.point.variant.id: e.point.variant for e in (*front, choice.pick, choice.second) if e is not None}
    made = [(variant, _row(one, variant)) for variant in wanted.values() if variant != one.baseline.variant]
    rows = [(variant, row) for variant, row in made if isinstance(row, Row)]
    measure_rows(one.this, [one.baseline, *(row for _, row in rows)])
    for variant, row in [(one.baseline.variant, one.baseline), *rows]:
        for backend in one.backends:
            _settle(one, Point(variant=variant, backend=backend), row)
    measured = one.store.evidence()
    # Only what this one run measured side by side is compared: an older latency of another point could enter by noise.
    finalists = [e for e in measured if e.point.variant.id in {one.baseline.variant.id, *wanted}]
    found = OptimizeResult(
        choice=search.choose(finalists, one.budget, of=len(measured)),
        front=search.front(finalists),
        measured=measured,
        ruled_out=tuple((name, out) for name, (_, out) in one.store.candidates().items() if out),
        failures=tuple(one.store.failures().items()),
        unfinished=tuple(point.id for point in left),
        result=outcome.finish(one.this, one.baseline, rows, notes),
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
    temporary = folder / f".{OUTCOME}"
    temporary.write_text(serde.dumps(content), encoding="utf-8")
    temporary.replace(folder / OUTCOME)
