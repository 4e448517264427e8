"""Measure the engines of a build in one interleaved run, and compare each with the native FP32 baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rdeploy import measure
from rdeploy.intake import Build
from rdeploy.steps import Built, Embedded, Exported, Quantized, Rounded
from rdeploy.types import Comparison, Cost, EngineResult, OnnxModel, Variant
from rdeploy.worker.jobs import Entry, Measured, MeasureJob, Pixels


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
    notes: tuple[str, ...] = ()

    @property
    def cost(self) -> Cost:
        """What the variant's graph costs, in the precision that it is written in."""
        return (self.rounded or self.quantized or self.exported).cost

    @property
    def exact(self) -> OnnxModel:
        """The variant in FP32, taking what its engines take."""
        return (self.embedded or self.exported).onnx


def measure_rows(this: Build, rows: Sequence[Row]) -> None:
    """Measure every engine that can run here in one interleaved run, and compare each with the baseline's."""
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
        entries=tuple(entries), timing=this.target.timing, threads=this.target.threads, seed=this.request.seed
    )
    found = this.steps.measured(job, hashes)
    for index, row in enumerate(rows):
        for backend, result in row.results.items():
            if measured := found.get(f"{index}/{backend}"):
                row.results = row.results | {backend: _joined(this, result, measured)}
    for index, row in list(enumerate(rows))[1:]:
        _compare(this, rows[0], row, index, found)


def _entry(this: Build, row: Row, name: str, built: Built) -> Entry:
    pixels = this.steps.pixels(this.judged, this.input_size(row.variant), this.spec)
    return Entry(
        name=name,
        backend=built.engine.backend,
        path=str(built.folder / built.engine.path),
        batch=this.target.batch_sizes[0],
        weights_bytes=row.cost.weight_bytes,
        activation_bytes=row.cost.activation_bytes * this.target.batch_sizes[0],
        build_peak_bytes=built.engine.build_peak_bytes,
        input=Pixels(pixels=str(pixels), preprocessing=this.spec.preprocessing),
    )


def _joined(this: Build, result: EngineResult, measured: Measured) -> EngineResult:
    return replace(result, measurement=measured.measurement, failure=measured.failure)


def _compare(this: Build, baseline: Row, row: Row, index: int, found: Mapping[str, Measured]) -> None:
    """Add to each measured engine how it compares with the native FP32 baseline on the same backend."""
    for backend, result in row.results.items():
        mine, native = found.get(f"{index}/{backend}"), found.get(f"0/{backend}")
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
