"""The line from a trained model to its bundles: load, resize, export, quantize, build, verify, measure, bundle.

`build` is the loop over variants around `run_variant`, which is the line itself. A variant that fails becomes a row with
its stage and its reason and takes nobody down; only what the baseline needs ends the build.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rdeploy import backends, bundle, environment, measure, models, serde, targets
from rdeploy.data import advisor, calibration, images
from rdeploy.data.images import ImageSet
from rdeploy.errors import ConfigError, MissingDependency, RdeployError, StageError, Unsupported
from rdeploy.manifest import p50_ms
from rdeploy.steps import Built, Exported, LazyModel, Quantized, Steps
from rdeploy.store import Store, default_root
from rdeploy.types import (
    BuildRequest,
    BuildResult,
    Comparison,
    EngineResult,
    Failure,
    ModelSpec,
    OnnxModel,
    QuantOptions,
    Result,
    Target,
    Variant,
    Verification,
    format_size,
)
from rdeploy.worker import JobFailed
from rdeploy.worker.jobs import Entry, Measured, MeasureJob, Pixels, VerifyRequest

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
REFERENCE = "onnxruntime"
"""Executes the FP32 graphs that others are compared with, and graphs whose own hardware is not here."""
CACHE_BYTES = 20 << 30
_AT_ONCE = 2
_SMALL_MACS = 1_500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What one `rdeploy build` works with; everything that its variants share."""

    request: BuildRequest
    steps: Steps
    model: LazyModel
    calib: ImageSet
    judged: ImageSet
    """The images that engines are verified on: the labelled ones, or else those of the calibration."""

    @property
    def target(self) -> Target:
        return self.steps.target

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec


@dataclass(slots=True, kw_only=True)
class Row:
    """A variant on its way: what it is, and what the stages have made of it so far."""

    variant: Variant
    graphs: dict[str, OnnxModel]
    """Backend -> the graph it is given."""
    exported: Exported
    quantized: Quantized | None = None
    built: dict[str, Built] | None = None
    results: dict[str, EngineResult] | None = None
    notes: tuple[str, ...] = ()


def build(request: BuildRequest, *, progress: Progress | None = None) -> BuildResult:
    """Build and measure every variant that was asked for beside the native FP32 baseline, and write the bundles.

    Raises:
        ConfigError: the request, the images or the model are wrong.
        MissingDependency: none of the target's backends is installed.
        StageError: the baseline itself cannot be exported, built or run.
    """
    started = time.perf_counter()
    steps = Steps(target=_target(request), store=Store(default_root()), progress=progress or log.info)
    this, notes = _prepare(request, steps)
    native = Variant(resolution=this.spec.native_resolution)
    baseline = run_variant(this, native, reference=None)
    outputs = (baseline.built or {})[REFERENCE].outputs if REFERENCE in (baseline.built or {}) else None
    notes += _advice(this, baseline)
    rows = [(variant, _contained(this, variant, outputs)) for variant in _variants(this)]
    _measure(this, [baseline, *(row for _, row in rows if isinstance(row, Row))])
    result = _result(this, baseline, rows, notes)
    result = replace(result, timings_s=_timings(steps, started))
    result = replace(result, variants=tuple(_bundled(this, result, row) for row in zip(result.variants, rows)))
    steps.store.prune(CACHE_BYTES)
    return result


def run_variant(this: Build, variant: Variant, *, reference: Path | None) -> Row:
    """Take one variant down the line, from the model to verified engines.

    Args:
        reference: the native model's outputs on the judged images; None when this variant is the native one.
    """
    exported = this.steps.exported(this.model, variant.resolution, variant.at, this.judged)
    row = Row(variant=variant, exported=exported, graphs=dict.fromkeys(this.target.backends, exported.onnx))
    if variant.precision == "int8":
        _quantize(this, row)
    float_outputs = _float_outputs(this, row, reference)
    row.built = _build_engines(this, row, _verification_of(this, variant, float_outputs, reference))
    row.results = {name: _engine_result(this, row, name) for name in this.target.backends}
    return row


def _target(request: BuildRequest) -> Target:
    """Return the target profile with the request's own backends and batch sizes, without the backends that are missing."""
    target = targets.load(request.target)
    target = replace(
        target,
        backends=request.backends or target.backends,
        batch_sizes=request.batch_sizes or target.batch_sizes,
    )
    missing = {name: reason for name in target.backends if (reason := backends.find(name).unavailable())}
    present = tuple(name for name in target.backends if name not in missing)
    if not present:
        raise MissingDependency(f"target {target.name}: none of its backends is here: {'; '.join(missing.values())}")
    if backends.find(REFERENCE).unavailable():
        raise MissingDependency("building needs ONNX Runtime to compare with", install="pip install 'rdeploy[cpu]'")
    return replace(target, backends=present)


def _prepare(request: BuildRequest, steps: Steps) -> tuple[Build, tuple[str, ...]]:
    """Find the images and the model before any work is done, so that a wrong request costs nothing."""
    if request.calib and calibration.is_path(request.calib):  # the images are quicker to look at than the model
        images.collect(request.calib, limit=1)
    with steps.stage("load", request.model):
        model = _model(request, steps.store)
    calib, judged, notes = _images(request, steps, model.spec)
    wanted = targets.load(request.target).backends if not request.backends else request.backends
    for name in wanted:
        if name not in steps.target.backends:
            notes += (f"{name} was left out: {backends.find(name).unavailable()}",)
    if model.spec.assumed:
        notes += (f"assumed, since the model does not say: {', '.join(model.spec.assumed)} (see --mean, --std, ...)",)
    if len(steps.target.batch_sizes) > 1:
        notes += (f"engines take batches of {min(steps.target.batch_sizes)} to {max(steps.target.batch_sizes)}; "
                  f"measured at {steps.target.batch_sizes[0]}",)  # fmt: skip
    return Build(request=request, steps=steps, model=model, calib=calib, judged=judged), notes


def _model(request: BuildRequest, store: Store) -> LazyModel:
    """Return the model; where a file or a name decides everything, its facts come from the cache and no torch is loaded."""
    key = models.source_key(request.model, request.load)
    if key is None:
        loaded = models.load(request.model, request.load)
        return LazyModel(loaded.spec, loaded.onnx, lambda: loaded)
    first: list[models.Loaded] = []

    def load() -> models.Loaded:
        if not first:
            first.append(models.load(request.model, request.load))
        return first[0]

    def write(folder: Path) -> None:
        facts = {"spec": load().spec, "onnx": load().onnx is not None}
        (folder / "model.json").write_text(serde.dumps(facts))

    facts = serde.loads((store.make("model", key, write) / "model.json").read_text())
    spec = replace(serde.from_json(ModelSpec, facts["spec"]), source=request.model)
    return LazyModel(spec, Path(request.model) if facts["onnx"] else None, load)


def _images(request: BuildRequest, steps: Steps, spec: ModelSpec) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Return the calibration images, the images to judge on, and what is to be said about them."""
    data = images.collect(request.data, labelled=True, class_names=spec.labels) if request.data else None
    notes: tuple[str, ...] = ()
    if request.calib:
        calib = calibration.collect_calibration(
            request.calib, limit=request.calib_samples, seed=request.seed, store=steps.store, spec=spec
        )
        if request.calib != calibration.RANDOM:
            pixels = images.load_pixels(steps.pixels(calib, spec.native_resolution, spec))
            notes = advisor.advise(calib, pixels, asked=request.calib_samples)
        else:
            notes = ("calibrated on random data, as asked: speed is real, accuracy is ruined",)
    else:
        calib = data or calibration.stand_in_images(spec, seed=request.seed, store=steps.store)
        if data is None:
            notes = ("no images were given: engines were compared on random pictures, give --calib or --data",)
    if data is not None and data.skipped:
        notes += (f"{len(data.skipped)} of the labelled images could not be read and were left out",)
    return calib, data or calib, notes


def _variants(this: Build) -> list[Variant]:
    """Return the variants asked for: every resolution in every precision, each once."""
    height, width = this.spec.native_resolution
    sizes = [(max(1, round(height * s)), max(1, round(width * s))) for s in this.request.scales]
    quant = QuantOptions(calibrator=this.request.calibrator, samples=this.request.calib_samples)
    found = [
        Variant(resolution=size, precision=precision, at=this.request.at, quant=quant if precision == "int8" else None)
        for size in (*sizes, *this.request.resolutions)
        for precision in this.request.precisions
    ]
    return list(dict.fromkeys(found))


def _contained(this: Build, variant: Variant, reference: Path | None) -> Row | Failure:
    """Run a variant; whatever goes wrong in it becomes its failure."""
    try:
        if variant.precision not in ("fp32", "int8"):
            message = f"{variant.precision.upper()} variants are not built yet; INT8 and FP32 are"
            return Failure(stage="quantize", error="Unsupported", message=message)
        size = this.steps.snapped(this.model, variant.resolution, variant.at)
        row = run_variant(this, replace(variant, resolution=size), reference=reference)
        if size != variant.resolution:
            asked, got = format_size(variant.resolution), format_size(size)
            row.notes = (f"{asked} was asked for; {got} is the nearest that this model can take", *row.notes)
        return row
    except (ConfigError, MissingDependency) as error:
        raise error
    except RdeployError as error:
        return _failure(error, this.request)
    except Exception as error:
        log.exception("variant %s", variant.id)
        return Failure(stage="variant", error=type(error).__name__, message=str(error), reproduce=this.request.command)


def _failure(error: RdeployError, request: BuildRequest) -> Failure:
    stage = error.stage if isinstance(error, StageError) else "resize" if isinstance(error, Unsupported) else "variant"
    kind = error.error if isinstance(error, JobFailed) else type(error).__name__
    again = error.reproduce if isinstance(error, JobFailed) else request.command
    return Failure(stage=stage, error=kind, message=str(error).removeprefix(f"{stage}: "), reproduce=again)


def _quantize(this: Build, row: Row) -> None:
    """Give every backend the INT8 graph of its scheme."""
    schemes = {name: backends.find(name).scheme(this.target) for name in this.target.backends}
    distinct = {replace(scheme, name=""): scheme for scheme in reversed(schemes.values())}
    quant = row.variant.quant or QuantOptions()
    made = this.steps.quantized(row.exported, tuple(distinct.values()), this.calib, this.spec, quant)
    by_backend = {name: made[distinct[replace(scheme, name="")].name] for name, scheme in schemes.items()}
    row.graphs = {name: quantized.onnx for name, quantized in by_backend.items()}
    row.quantized = by_backend[this.target.backends[0]]


def _verification_of(this: Build, variant: Variant, exact: Path | None, native: Path | None) -> VerifyRequest:
    """Return what to verify an engine on: the judged images at this resolution, and the outputs to compare with."""
    labels = this.judged.labels if this.request.data else None
    return VerifyRequest(
        pixels=str(this.steps.pixels(this.judged, variant.resolution, this.spec)),
        preprocessing=this.spec.preprocessing,
        reference=None if exact is None else str(exact),
        native=None if native is None else str(native),
        labels=labels,
        limits=this.target.limits,
    )


def _float_outputs(this: Build, row: Row, native: Path | None) -> Path | None:
    """Return the outputs of the variant's FP32 graph, executed in FP32: what its engines are compared with."""
    request = _verification_of(this, row.variant, None, native)
    return this.steps.built(row.exported.onnx, REFERENCE, request).outputs


def _build_engines(this: Build, row: Row, request: VerifyRequest) -> dict[str, Built]:
    """Build and verify the engines of all backends, two at a time: nothing is timed here."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = {name: pool.submit(this.steps.built, onnx, name, request) for name, onnx in row.graphs.items()}
        built: dict[str, Built] = {}
        failures: dict[str, EngineResult] = {}
        for name, job in jobs.items():
            try:
                built[name] = job.result()
            except StageError as error:
                failures[name] = EngineResult(backend=name, failure=_failure(error, this.request))
    row.results = failures
    if not built:
        first = next(iter(failures.values())).failure
        raise StageError(first.stage if first else "build", first.message if first else "no engine was built")
    if REFERENCE not in built and row.variant.precision == "fp32":
        built[REFERENCE] = this.steps.built(row.exported.onnx, REFERENCE, request)
    return built


def _engine_result(this: Build, row: Row, backend: str) -> EngineResult:
    if backend not in (row.built or {}):
        return (row.results or {})[backend]
    built = (row.built or {})[backend]
    verification, engine = built.verification, built.engine
    if built.not_run is not None:
        engine = replace(engine, notes=(*engine.notes, built.not_run))
        verification = _verified_elsewhere(this, row, backend)
    if verification is not None and not verification.passed:
        verification = _explained(this, row, backend, verification)
    return EngineResult(backend=backend, engine=engine, verification=verification)


def _verified_elsewhere(this: Build, row: Row, backend: str) -> Verification | None:
    """Verify the graph of an engine whose hardware is not here by executing that very graph on the CPU."""
    exact = _float_outputs(this, row, None)
    native = _native_outputs(this)
    built = this.steps.built(row.graphs[backend], REFERENCE, _verification_of(this, row.variant, exact, native))
    found = built.verification
    return None if found is None else replace(found, executed_by=f"{found.executed_by} (the same graph)")


def _native_outputs(this: Build) -> Path | None:
    native = Variant(resolution=this.spec.native_resolution)
    exported = this.steps.exported(this.model, native.resolution, native.at, this.judged)
    return this.steps.built(exported.onnx, REFERENCE, _verification_of(this, native, None, None)).outputs


def _explained(this: Build, row: Row, backend: str, verification: Verification) -> Verification:
    """Add to a failed INT8 verification the first layer at which the error jumps."""
    if row.variant.precision != "int8":
        return verification
    from rdeploy.quantize import recipe

    image = calibration.NormalisedImages(this.steps.pixels(this.judged, row.variant.resolution, this.spec), this.spec)[
        0
    ]
    jump = recipe.first_divergence(Path(row.exported.onnx.path), Path(row.graphs[backend].path), image)
    return replace(verification, reasons=(*verification.reasons, *([jump] if jump else [])))


def _advice(this: Build, baseline: Row) -> tuple[str, ...]:
    """Return a sentence when another usual normalisation suits the model clearly better."""
    if this.spec.task != "classification" or (
        this.request.calib in (None, calibration.RANDOM) and not this.request.data
    ):
        return ()
    resolution = this.spec.native_resolution
    count = 32 if baseline.exported.cost.macs < _SMALL_MACS else 12
    pixels = images.load_pixels(this.steps.pixels(this.judged, resolution, this.spec))[:count]

    def write(folder: Path) -> None:
        plugin = backends.find(REFERENCE)
        engine = (baseline.built or {})[REFERENCE]
        with (
            this.steps.stage("verify", "preprocessing"),
            plugin.open_session(engine.folder / engine.engine.path, threads=this.target.threads) as session,
        ):
            name, out = session.inputs[0].name, session.outputs[0].name
            said = advisor.suspect_preprocessing(lambda x: session.run({name: x})[out], pixels, this.spec.preprocessing)
        (folder / "advice.json").write_text(serde.dumps([said] if said else []))

    key = serde.digest([baseline.exported.onnx.sha256, this.judged.sha256, this.spec.preprocessing, count])
    return tuple(serde.loads((this.steps.store.make("advice", key, write) / "advice.json").read_text()))


def _measure(this: Build, rows: Sequence[Row]) -> None:
    """Measure every engine that can run here in one interleaved run, and compare each with the baseline's."""
    entries, hashes = [], []
    for index, row in enumerate(rows):
        for backend, result in (row.results or {}).items():
            built = (row.built or {}).get(backend)
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
        for backend, result in (row.results or {}).items():
            if measured := found.get(f"{index}/{backend}"):
                row.results = (row.results or {}) | {backend: _joined(this, result, measured)}
    for index, row in list(enumerate(rows))[1:]:
        _compare(this, rows[0], row, index, found)


def _entry(this: Build, row: Row, name: str, built: Built) -> Entry:
    cost = row.quantized.cost if row.quantized else row.exported.cost
    pixels = this.steps.pixels(this.judged, row.variant.resolution, this.spec)
    return Entry(
        name=name,
        backend=built.engine.backend,
        path=str(built.folder / built.engine.path),
        batch=this.target.batch_sizes[0],
        weights_bytes=cost.weight_bytes,
        activation_bytes=cost.activation_bytes * this.target.batch_sizes[0],
        input=Pixels(pixels=str(pixels), preprocessing=this.spec.preprocessing),
    )


def _joined(this: Build, result: EngineResult, measured: Measured) -> EngineResult:
    return replace(result, measurement=measured.measurement, failure=measured.failure)


def _compare(this: Build, baseline: Row, row: Row, index: int, found: Mapping[str, Measured]) -> None:
    """Add to each measured engine how it compares with the native FP32 baseline on the same backend."""
    for backend, result in (row.results or {}).items():
        mine, native = found.get(f"{index}/{backend}"), found.get(f"0/{backend}")
        reference = (baseline.results or {}).get(backend)
        if not (mine and native and mine.measurement and native.measurement and reference and reference.engine):
            continue
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
        row.results = (row.results or {}) | {backend: replace(result, comparison=comparison)}


def _result(
    this: Build, baseline: Row, rows: Sequence[tuple[Variant, Row | Failure]], notes: tuple[str, ...]
) -> BuildResult:
    return BuildResult(
        spec=this.spec,
        target=this.target,
        baseline=_row_result(this, baseline),
        variants=tuple(
            _row_result(this, row) if isinstance(row, Row) else _failed(this, variant, row) for variant, row in rows
        ),
        environment=environment.describe(),
        notes=notes,
    )


def _row_result(this: Build, row: Row) -> Result:
    engines = tuple((row.results or {})[name] for name in this.target.backends if name in (row.results or {}))
    return Result(
        variant=row.variant,
        target=this.target.name,
        status="ok" if any(one.engine for one in engines) else "failed",
        engines=tuple(sorted(engines, key=lambda one: p50_ms(one.measurement))),
        cost=row.quantized.cost if row.quantized else row.exported.cost,
        quantization=row.quantized.quantization if row.quantized else None,
        reproduce=this.request.command,
        notes=row.notes,
    )


def _failed(this: Build, variant: Variant, failure: Failure) -> Result:
    status = "unsupported" if failure.error == "Unsupported" else "failed"
    return Result(
        variant=variant, target=this.target.name, status=status, failure=failure, reproduce=this.request.command
    )


def _bundled(this: Build, result: BuildResult, pair: tuple[Result, tuple[Variant, Row | Failure]]) -> Result:
    """Write the bundle of one variant and return its row with the bundle's folder."""
    row, (_, made) = pair
    if isinstance(made, Failure) or row.status != "ok":
        return row
    folder = Path(this.request.out) / f"{_safe(this.spec.name)}-{row.variant.id}"
    portable = made.graphs[this.target.backends[0]]
    placed = {one.engine.path: (made.built or {})[one.backend].folder for one in row.engines if one.engine}
    logs = {f"{name}.log": built.folder.parent / "worker.log" for name, built in (made.built or {}).items()}
    with this.steps.stage("bundle", row.variant.id):
        row = replace(row, bundle=str(folder))
        bundle.write(folder, result=result, row=row, onnx=Path(portable.path), engines=placed, logs=logs)
    return row


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _timings(steps: Steps, started: float) -> tuple[tuple[str, float], ...]:
    total = time.perf_counter() - started
    other = max(0.0, total - sum(steps.timings.values()))
    return (
        *((name, round(s, 3)) for name, s in steps.timings.items()),
        ("other", round(other, 3)),
        ("total", round(total, 3)),
    )
