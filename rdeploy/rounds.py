"""One round of a search: points go in, engines are built and measured beside the native model, what was found is written down."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rdeploy import judging, pipeline
from rdeploy.cluster import Crew
from rdeploy.compare import Row, measure_rows
from rdeploy.intake import Build
from rdeploy.manifest import failed, p50_ms
from rdeploy.results import EngineResult, Failure
from rdeploy.run_store import RunStore
from rdeploy.search import Budget, Evidence, Interval, Point, Way
from rdeploy.standing import Watcher
from rdeploy.types import Timing, Variant

AT_ONCE = 3
"""How many variants are measured together, beside the native model."""
_SCREENING = 4
"""How many times shorter a round measures than the last run, which measures the front again."""
_LEAST_SAMPLES = 64
LOOK_S = 1.0
"""How often to look for what another process on the same run is at."""


@dataclass(slots=True)
class Search:
    """One run of the loop: what it works with, when it has to end, and the rows that it has built."""

    this: Build
    budget: Budget
    store: RunStore
    deadline: float
    baseline: Row
    native_outputs: Path | None
    crew: Crew
    watcher: Watcher
    left_out: dict[str, str] = field(default_factory=dict)
    """The precisions and backends that cannot be searched here, with the reason."""
    rows: dict[str, Row] = field(default_factory=dict)
    natives: dict[int, Row] = field(default_factory=dict)
    """The native model as it was measured at each batch size."""

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that are searched: more images at a time take longer and more memory, and may raise throughput."""
        sizes = tuple(dict.fromkeys(self.this.target.batch_sizes))
        return sizes if self.budget.objective == "throughput" else sizes[:1]

    @property
    def ways(self) -> tuple[Way, ...]:
        """The backends whose engines can be measured on this machine, at each batch size that is searched."""
        runnable = [name for name, built in self.baseline.built.items() if built.not_run is None]
        return tuple((name, batch) for name in runnable for batch in self.batches)

    @property
    def at_once(self) -> int:
        """How many variants are measured together: each is open as often as there are batch sizes."""
        return max(1, AT_ONCE // len(self.batches))

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def measure(one: Search, points: Sequence[Point]) -> None:
    """Build, verify and measure points beside the native model, briefly, and write down what was found."""
    rows: dict[str, Row] = {}
    wanted = {p.variant.id: {q.way for q in points if q.variant == p.variant} for p in points}
    for variant in dict.fromkeys(point.variant for point in points):
        made = row(one, variant, {backend for backend, _ in wanted[variant.id]})
        if isinstance(made, Failure):
            for point in (p for p in points if p.variant == variant):
                one.store.settle(point.id, None, failure=f"{made.stage}: {made.message}")
        else:
            rows[variant.id] = made
    if not rows:
        return
    also = wanted.get(one.baseline.variant.id, set())
    others = [(row, wanted[name]) for name, row in rows.items() if row is not one.baseline]
    measured = side_by_side(one, others, also=also, timing=_screening(one))
    for point in (p for p in points if p.variant.id in rows):
        settle(one, point, measured[point.variant.id, point.batch])


def await_others(one: Search, points: Sequence[Point]) -> None:
    """Wait until no other process is at one of the points, or the time is up."""
    names = {point.id for point in points}
    while names & one.store.elsewhere() and not one.late():
        time.sleep(LOOK_S)


def side_by_side(
    one: Search,
    rows: Sequence[tuple[Row, Collection[Way]]],
    *,
    also: Collection[Way] = (),
    timing: Timing | None = None,
    layers: bool = False,
) -> dict[tuple[str, int], Row]:
    """Measure rows in the ways given with each, in one run with the native model in all of those, while no other process on
    this run measures.

    Returns:
        What was measured of each variant (its id) at each batch size; the native model at each is added to `natives`.

    Args:
        also: more ways to measure the native model in.
    """
    ways = {*also, *(way for _, own in rows for way in own)}
    measured = [_at(row, batch, own) for row, own in [(one.baseline, ways), *rows] for batch in _batches(own)]
    with one.store.measuring():
        measure_rows(one.this, measured, layers=layers, timing=timing)
    for native in measured[: len(_batches(ways))]:
        batch = native.batch or 1
        known = one.natives.get(batch, one.baseline)
        one.natives[batch] = replace(
            native, results=known.results | native.results, blocks=known.blocks | native.blocks
        )
    return {(row.variant.id, row.batch or 1): row for row in measured}


def _batches(ways: Collection[Way]) -> list[int]:
    return sorted({batch for _, batch in ways})


def _at(row: Row, batch: int, ways: Collection[Way]) -> Row:
    """Return the row with its engines for the backends that are to be measured at a batch size."""
    results = {name: found for name, found in row.results.items() if (name, batch) in ways}
    return replace(row, batch=batch, results=results, blocks={})


def _screening(one: Search) -> Timing:
    """Return how long to measure what may be ruled out by it: a fraction of what the last run takes."""
    full = one.this.target.timing
    return replace(
        full,
        min_samples=max(_LEAST_SAMPLES, full.min_samples // _SCREENING),
        max_samples=max(_LEAST_SAMPLES, full.max_samples // _SCREENING),
        min_time_s=full.min_time_s / _SCREENING,
        max_time_s=full.max_time_s / _SCREENING,
        max_warmup_s=full.max_warmup_s / 2,
    )


def settle(one: Search, point: Point, row: Row) -> None:
    found = row.results.get(point.backend)
    problem = _problem(found)
    evidence = None if problem or found is None else _evidence(one, point, row, found)
    one.store.settle(point.id, evidence, failure=problem)


def row(one: Search, variant: Variant, backends: Collection[str]) -> Row | Failure:
    """Return a variant with verified engines for these backends at least; what is there already is not built again."""
    if variant == one.baseline.variant:
        return one.baseline
    known = one.rows.get(variant.id)
    missing = {name for name in backends if known is None or name not in known.results}
    if known is not None and not missing:
        return known
    one.crew.bring(variant)
    made = pipeline.contained(one.this, variant, one.native_outputs, missing)
    if isinstance(made, Failure):
        return made
    if known is not None:
        made = replace(made, built=known.built | made.built, results=known.results | made.results)
    one.rows[variant.id] = made
    return made


def _problem(found: EngineResult | None) -> str:
    if found is None:
        return "no engine was built for this backend"
    if found.failure is not None:
        return f"{found.failure.stage}: {found.failure.message}"
    if failed(found):
        return "; ".join(found.verification.reasons) if found.verification else "verification failed"
    return "" if found.measurement else "built, but its hardware is not here: nothing was measured"


def _evidence(one: Search, point: Point, row: Row, found: EngineResult) -> Evidence:
    """Return what was measured; the latency is the native model's first one over the speed-up: rounds can be compared."""
    assert found.measurement is not None  # `_problem` has asked
    assert found.engine is not None
    native, compared = replace(point, variant=one.baseline.variant), found.comparison
    measured = p50_ms(found.measurement)
    latency = Interval(value=measured, low=measured, high=measured)
    if compared is not None:
        known = next((e.latency_ms.value for e in one.store.evidence() if e.point == native), None)
        reference = known or p50_ms(one.natives[point.batch].results[point.backend].measurement)
        low, high = compared.speedup_ci95
        latency = Interval(value=reference / compared.speedup, low=reference / high, high=reference / low)
    return Evidence(
        point=point,
        macs=row.exported.cost.macs,
        drop=Interval(value=0, low=0, high=0)
        if row.variant == one.baseline.variant or not found.verification
        else judging.drop_of(found.verification),
        latency_ms=latency,
        throughput_ips=1000.0 * found.measurement.batch / latency.value,
        memory_bytes=found.measurement.memory.process_peak,
        size_bytes=found.engine.size_bytes,
        unfit=found.measurement.unfit,
        changed=judging.changed_of(found.verification) if row.variant != one.baseline.variant else None,
        samples=judging.labels_of(found.verification),
    )
