"""Measure the engines of a build in one interleaved run, and compare each with the native FP32 baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rdeploy import manifest, measure, recommend, usability
from rdeploy.adapted import Adaptation
from rdeploy.intake import Build
from rdeploy.recommend import Candidate
from rdeploy.results import Comparison, Cost, EngineResult, Recommendation
from rdeploy.steps import engine
from rdeploy.steps.made import Built, Embedded, Exported, Quantized, Rounded
from rdeploy.types import OnnxModel, Timing, Variant
from rdeploy.worker.jobs import Asked, Entry, Measured, MeasureJob, Pixels

Blocks = Sequence[Sequence[float]]


@dataclass(slots=True, kw_only=True)
class Row:
    """A variant on its way: what it is, and what the stages have made of it so far."""

    variant: Variant
    graphs: dict[str, OnnxModel]
    """Backend -> the graph it is given."""
    exported: Exported
    quantized: Quantized | None = None
    rounded: Rounded | None = None
    embedded: Embedded | None = None
    """Of the FP32 graph: what the engines of a variant with its preprocessing inside are compared with."""
    inner: dict[str, OnnxModel] = field(default_factory=dict)
    """Backend -> its graph without the preprocessing, where that is inside the graph it is given."""
    built: dict[str, Built] = field(default_factory=dict)
    results: dict[str, EngineResult] = field(default_factory=dict)
    blocks: dict[str, Blocks] = field(default_factory=dict)
    """Backend -> the latencies of each round; the same round of all rows ran at the same time."""
    batch: int | None = None
    """How many images a run takes where it is measured; the target's first batch size where nothing is said."""
    adaptation: Adaptation | None = None
    """What was done to make the lower resolution good."""
    notes: tuple[str, ...] = ()

    @property
    def cost(self) -> Cost:
        """What the variant's graph costs, in the precision that it is written in."""
        return (self.rounded or self.quantized or self.exported).cost

    @property
    def exact(self) -> OnnxModel:
        """The variant in FP32, taking what its engines take."""
        return (self.embedded or self.exported).onnx


def measure_rows(this: Build, rows: Sequence[Row], *, layers: bool = False, timing: Timing | None = None) -> None:
    """Measure every engine that can run here in one interleaved run, and compare each with the baseline's.

    The baseline is the first row; where rows differ in their batch, the first of each batch.

    Args:
        layers: time the layers too, by each runtime's own profiler, after all latencies are there.
        timing: how long to measure; as the target says where nothing is said.
    """
    entries, hashes = [], []
    for index, row in enumerate(rows):
        for backend, result in row.results.items():
            built = row.built.get(backend)
            if result.engine is None or built is None or built.not_run is not None:
                continue
            entries.append(_entry(this, row, f"{index}/{backend}", built))
            hashes.append(f"{index}/{backend}/{result.engine.sha256}")
    if not entries:
        return
    job = MeasureJob(
        entries=tuple(entries),
        timing=timing or this.target.timing,
        threads=this.target.threads,
        seed=this.request.seed,
        asked=Asked(layers=layers),
    )
    found = engine.measured(this.steps, job, hashes)
    for index, row in enumerate(rows):
        for backend, result in row.results.items():
            if measured := found.get(f"{index}/{backend}"):
                row.results = row.results | {backend: _joined(this, result, measured)}
                row.blocks[backend] = measured.blocks
    first: dict[int, int] = {}
    for index, row in enumerate(rows):
        baseline = first.setdefault(_batch(this, row), index)
        if baseline != index:
            _compare(this, (baseline, rows[baseline]), (index, row), found)


def _entry(this: Build, row: Row, name: str, built: Built) -> Entry:
    spec = this.fed(row.variant)
    pixels = this.steps.pixels(this.judged, this.input_size(row.variant), spec)
    return Entry(
        name=name,
        backend=built.engine.backend,
        path=str(built.folder / built.engine.path),
        batch=_batch(this, row),
        weights_bytes=row.cost.weight_bytes,
        activation_bytes=row.cost.activation_bytes * _batch(this, row),
        build_peak_bytes=built.engine.build_peak_bytes,
        input=Pixels(pixels=str(pixels), preprocessing=spec.preprocessing),
        onnx=row.graphs[built.engine.backend].path,
    )


def _batch(this: Build, row: Row) -> int:
    return row.batch or this.target.batch_sizes[0]


def _joined(this: Build, result: EngineResult, measured: Measured) -> EngineResult:
    return replace(result, measurement=measured.measurement, failure=measured.failure)


def _compare(this: Build, native_row: tuple[int, Row], its_row: tuple[int, Row], found: Mapping[str, Measured]) -> None:
    """Add to each measured engine how it compares with the native FP32 baseline on the same backend."""
    (reference_index, baseline), (index, row) = native_row, its_row
    for backend, result in row.results.items():
        mine, native = found.get(f"{index}/{backend}"), found.get(f"{reference_index}/{backend}")
        reference = baseline.results.get(backend)
        if not (mine and native and mine.measurement and native.measurement and reference and reference.engine):
            continue
        measure.check_comparable(native.measurement, mine.measurement)
        ratio, interval, verdict = measure.speedup(native.blocks, mine.blocks, seed=this.request.seed)
        peaks = native.measurement.memory.process_peak, mine.measurement.memory.process_peak
        size = reference.engine.size_bytes / result.engine.size_bytes if result.engine else None
        comparison = Comparison(
            backend=backend,
            speedup=ratio,
            speedup_ci95=interval,
            memory_ratio=peaks[1] / peaks[0] if peaks[0] and peaks[1] else None,
            size_ratio=1 / size if size else None,
            verdict=verdict,
        )
        row.results = row.results | {backend: replace(result, comparison=comparison)}


def recommendations(this: Build, rows: Sequence[Row]) -> tuple[Recommendation, ...]:
    """Return which precision to deploy at each place at which one other than FP32 was built.

    `rows` are the baseline, the variants and their FP32 twins. A mixed variant's curve gets its latencies, in place.
    """
    found = []
    for place in dict.fromkeys(row.variant.place for row in rows):
        same = [row for row in rows if row.variant.place == place]
        if all(row.variant.precision == "fp32" for row in same):
            continue
        exact = next((row for row in same if row.variant.precision == "fp32"), None)
        candidates = [one for row in same if (one := _candidate(row, exact)) is not None]
        against = recommend.fastest(candidates, recommend.FLOATS)
        candidates = [_with_speedup(this, one, against, same) for one in candidates]
        limits = {"max_drop": this.request.max_drop, "bearable": _bearable(same)}
        found.append(recommend.choose(place, candidates, **limits))
        for row in same:
            _price(row, exact)
    return tuple(found)


def _candidate(row: Row, exact: Row | None) -> Candidate | None:
    """Return the row's fastest engine that passed verification; where none could run here, one without a latency."""
    passed = [one for one in row.results.values() if one.engine and not manifest.failed(one)]
    best = min(passed, key=lambda one: manifest.p50_ms(one.measurement), default=None)
    if best is None:
        return None
    return Candidate(
        precision=row.variant.precision,
        backend=best.backend,
        p50_ms=manifest.p50_ms(best.measurement) if best.measurement else None,
        drop=_drop(best, exact) if exact is not row else 0.0,
        executed=manifest.executed_instead(row.variant.precision, best),
    )


def _bearable(rows: Sequence[Row]) -> float:
    """Return how many points INT8 may cost where no budget was set: fewer where they are points of accuracy."""
    verified = [one.verification for row in rows for one in row.results.values() if one.verification]
    labelled = any(verification.accuracy for verification in verified)
    return usability.BEARABLE_LABELLED if labelled else usability.BEARABLE_CHANGED


def _drop(one: EngineResult, exact: Row | None) -> float | None:
    """Return the points lost against FP32 at the same resolution: of accuracy with labels, else of agreement."""
    verification = one.verification
    if verification is None:
        return None
    twins = exact.results.values() if exact is not None else ()
    labelled = [t.verification.accuracy.value for t in twins if t.verification and t.verification.accuracy]
    if verification.accuracy is not None and labelled:
        return 100 * (max(labelled) - verification.accuracy.value)
    if verification.parity is None or verification.parity.top1_agreement is None:
        return None
    return 100 * (1 - verification.parity.top1_agreement)


def _with_speedup(this: Build, one: Candidate, against: Candidate | None, rows: Sequence[Row]) -> Candidate:
    if against is None or one.p50_ms is None:
        return one
    slow, fast = (
        next(row for row in rows if row.variant.precision == c.precision and c.backend in row.results).blocks.get(
            c.backend
        )
        for c in (against, one)
    )
    if not slow or not fast:
        return one
    ratio, interval, _ = measure.speedup(slow, fast, seed=this.request.seed)
    return replace(one, speedup=ratio, interval=interval)


def _price(row: Row, exact: Row | None) -> None:
    """Model the latency of every point of a mixed variant's curve, on the backend that the row is about."""
    fallbacks = row.quantized.quantization.fallbacks if row.quantized else None
    if row.quantized is None or fallbacks is None or exact is None:
        return
    for backend in row.results:
        mine, slow = row.results[backend].measurement, exact.results.get(backend)
        if mine is None or slow is None or slow.measurement is None:
            continue
        times = {"chosen_ms": manifest.p50_ms(mine), "float_ms": manifest.p50_ms(slow.measurement)}
        curve = recommend.priced(fallbacks.curve, layers=len(fallbacks.layers), **times)
        model = f"{backend}: linear in the share of MACs in float, between the measured mixed and FP32 engines"
        quantization = replace(
            row.quantized.quantization, fallbacks=replace(fallbacks, curve=curve, latency_model=model)
        )
        row.quantized = replace(row.quantized, quantization=quantization)
        return
