"""The line from a trained model to its bundles: load, resize, export, quantize, build, verify, measure, bundle.

`build` is the loop over variants around `run_variant`, which is the line itself. A variant that fails becomes a row with
its stage and its reason and takes nobody down; only what the baseline needs ends the build.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rdeploy import backends, bundle, compare, disagreements, environment, expectations, preflight, resize, serde
from rdeploy.compare import Row, measure_rows
from rdeploy.data import advisor, calibration, images
from rdeploy.data.images import ImageSet
from rdeploy.errors import ConfigError, MissingDependency, RdeployError, StageError, Unsupported
from rdeploy.intake import REFERENCE, Build, take_in
from rdeploy.manifest import p50_ms
from rdeploy.steps import Built, Steps
from rdeploy.types import (
    EXPECTED,
    BuildRequest,
    BuildResult,
    Cost,
    EngineResult,
    Failure,
    OnnxModel,
    QuantOptions,
    Result,
    Variant,
    Verification,
    format_size,
)
from rdeploy.worker import JobFailed
from rdeploy.worker.jobs import VerifyRequest

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
CACHE_BYTES = 20 << 30
_AT_ONCE = 2
_SMALL_MACS = 1_500_000_000


def build(request: BuildRequest, *, progress: Progress | None = None) -> BuildResult:
    """Build and measure every variant that was asked for beside the native FP32 baseline, and write the bundles.

    Raises:
        ConfigError: the request, the images or the model are wrong.
        MissingDependency: none of the target's backends is installed.
        StageError: the baseline itself cannot be exported, built or run.
    """
    started = time.perf_counter()
    this, notes = take_in(request, progress or log.info)
    native = Variant(resolution=this.spec.native_resolution)
    notes = (*_expected(this, native), *notes)
    baseline = run_variant(this, native, reference=None)
    outputs = native_outputs(this, baseline)
    notes += _advice(this, baseline)
    rows, same = _built_once([(variant, contained(this, variant, outputs)) for variant in variants(this)])
    notes += same
    built = [row for _, row in rows if isinstance(row, Row)]
    twins = _twins(this, built, outputs)
    measure_rows(this, [baseline, *built, *twins])
    advice = compare.recommendations(this, [baseline, *built, *twins])
    result = replace(_result(this, baseline, rows, notes), recommendations=advice)
    result = replace(result, timings_s=_timings(this.steps, started))
    result = replace(result, variants=tuple(_bundled(this, result, row) for row in zip(result.variants, rows)))
    _show_disagreements(this, outputs, [row for _, row in rows if isinstance(row, Row)])
    this.steps.store.prune(CACHE_BYTES)
    return result


def run_variant(this: Build, variant: Variant, *, reference: Path | None) -> Row:
    """Take one variant down the line, from the model to verified engines.

    Args:
        reference: the native model's outputs on the judged images; None when this variant is the native one.
    """
    exported = this.steps.exported(this.model, variant, this.judged)
    row = Row(variant=variant, exported=exported, graphs=dict.fromkeys(this.graphs_for, exported.onnx))
    if variant.precision == "int8":
        _quantize(this, row)
    if variant.precision != "fp32":
        _round(this, row)
    if variant.embeds_preprocessing:
        _embed(this, row)
    _lower(this, row)
    request = _verification_of(this, variant, _float_engine(this, row).outputs, reference)
    row.notes += _for_the_device(this, row, request)
    row.built, failed = _build_engines(this, row, request)
    row.results = failed | {name: _engine_result(this, row, name, request) for name in row.built}
    return row


def _expected(this: Build, native: Variant) -> tuple[str, ...]:
    """Say, before engines are built, what can be expected of the precisions that were asked for."""
    if set(this.request.precisions) <= {"fp32"}:
        return ()
    from rdeploy.graph import work

    onnx = this.steps.exported(this.model, native, this.judged).onnx
    target = replace(this.target, backends=this.graphs_for)
    found = expectations.expect(work.read(Path(onnx.path)), target, this.request.precisions)
    told = tuple(f"{EXPECTED}{sentence}" for sentence in found)
    for sentence in told:
        this.steps.progress(sentence)
    return told


def _advice(this: Build, baseline: Row) -> tuple[str, ...]:
    """Return a sentence when another usual normalisation suits the model clearly better."""
    real_images = this.request.data or this.request.calib not in (None, calibration.RANDOM)
    if this.spec.task != "classification" or this.request.load.random_init or not real_images:
        return ()
    resolution = this.spec.native_resolution
    count = 32 if baseline.exported.cost.macs < _SMALL_MACS else 12
    pixels = images.load_pixels(this.steps.pixels(this.judged, resolution, this.spec))[:count]

    def write(folder: Path) -> None:
        plugin = backends.find(REFERENCE)
        engine = _float_engine(this, baseline)
        with (
            this.steps.stage("verify", "preprocessing"),
            plugin.open_session(engine.folder / engine.engine.path, threads=this.target.threads) as session,
        ):
            name, out = session.inputs[0].name, session.outputs[0].name
            said = advisor.suspect_preprocessing(lambda x: session.run({name: x})[out], pixels, this.spec.preprocessing)
        (folder / "advice.json").write_text(serde.dumps([said] if said else []))

    key = serde.digest([baseline.exported.onnx.sha256, this.judged.sha256, this.spec.preprocessing, count])
    return tuple(serde.loads((this.steps.store.make("advice", key, write) / "advice.json").read_text()))


def variants(this: Build) -> list[Variant]:
    """Return the variants asked for: every place at every resolution in every precision, each once."""
    native, request = this.spec.native_resolution, this.request
    quant = QuantOptions(
        recipe=request.recipe,
        calibrator=request.calibrator,
        samples=request.calib_samples,
        max_drop=request.max_drop,
    )
    found = []
    for at in request.at:
        wanted = [resize.asked(at, native, scale=scale) for scale in request.scales]
        wanted += [resize.asked(at, native, resolution=size) for size in request.resolutions]
        for places, precision in itertools.product(wanted, request.precisions):
            plain = Variant(
                resolution=native,
                precision=precision,
                quant=quant if precision == "int8" else None,
                embeds_preprocessing=request.embed_preprocess,
            )
            found.append(resize.variant_of(plain, places, native))
    return list(dict.fromkeys(found))


def _built_once(
    rows: Sequence[tuple[Variant, Row | Failure]],
) -> tuple[list[tuple[Variant, Row | Failure]], tuple[str, ...]]:
    """Return the rows without those that turned out to be a variant that is there already, and a sentence for each."""
    kept: dict[str, tuple[Variant, Row | Failure]] = {}
    notes: tuple[str, ...] = ()
    for variant, made in rows:
        name = made.variant.id if isinstance(made, Row) else f"failed {variant.id}"
        if name in kept:
            notes += (f"{variant.id} comes down to {name}, which is there already: built once",)
        else:
            kept[name] = (variant, made)
    return list(kept.values()), notes


def settled_variant(this: Build, variant: Variant) -> tuple[Variant, tuple[str, ...]]:
    """Return the variant as the model can take it, and what became of what was asked for."""
    images = this.calib if this.request.calib not in (None, calibration.RANDOM) else None
    settled = this.steps.settled(this.model, variant, images)
    native, notes = this.spec.native_resolution, []
    for before, after in zip(resize.places_of(variant, native), resize.places_of(settled, native)):
        where = "" if after.at == resize.INPUT else f" at {after.at}"
        if before.resolution != after.resolution:
            asked, got = format_size(before.resolution), format_size(after.resolution)
            notes.append(f"{asked} was asked for{where}; {got} is the nearest that this model can take")
        notes += filter(None, [resize.said(after)])
    return settled, tuple(notes)


def contained(this: Build, variant: Variant, reference: Path | None) -> Row | Failure:
    """Run a variant; whatever goes wrong in it becomes its failure."""
    try:
        if variant.precision == "fp16" and (
            reason := expectations.no_fp16(replace(this.target, backends=this.graphs_for))
        ):
            return Failure(stage="fp16", error="Unsupported", message=reason)
        settled, notes = settled_variant(this, variant)
        row = run_variant(this, settled, reference=reference)
        row.notes = (*notes, *row.notes)
        return row
    except (ConfigError, MissingDependency) as error:
        raise error
    except RdeployError as error:
        return _failure(error, this.request)
    except Exception as error:
        log.exception("variant %s", variant.id)
        return Failure(stage="variant", error=type(error).__name__, message=str(error), reproduce=this.request.command)


def _twins(this: Build, rows: Sequence[Row], reference: Path | None) -> list[Row]:
    """Return quantized variants' FP32 twins that nobody asked for: only against those can be said whether INT8 pays."""
    known = {row.variant for row in rows if row.variant.precision == "fp32"} | {
        Variant(resolution=this.spec.native_resolution)
    }
    wanted = [replace(row.variant, precision="fp32", quant=None) for row in rows if row.quantized is not None]
    found = [contained(this, variant, reference) for variant in dict.fromkeys(wanted) if variant not in known]
    return [row for row in found if isinstance(row, Row)]


def _failure(error: RdeployError, request: BuildRequest) -> Failure:
    stage = error.stage if isinstance(error, (StageError, Unsupported)) else "variant"
    kind = error.error if isinstance(error, JobFailed) else type(error).__name__
    again = error.reproduce if isinstance(error, JobFailed) else request.command
    return Failure(stage=stage, error=kind, message=str(error).removeprefix(f"{stage}: "), reproduce=again)


def _quantize(this: Build, row: Row) -> None:
    """Give every backend the INT8 graph of its scheme."""
    schemes = {name: backends.find(name).scheme(this.target) for name in this.graphs_for}
    distinct = {replace(scheme, name=""): scheme for scheme in reversed(schemes.values())}
    quant = row.variant.quant or QuantOptions()
    labelled = this.judged if this.request.data and this.judged.labels is not None else None
    order = tuple(reversed(distinct.values()))  # the first backend decides what falls back to float
    made = this.steps.quantized(row.exported, order, this.calib, this.spec, quant, labelled)
    by_backend = {name: made[distinct[replace(scheme, name="")].name] for name, scheme in schemes.items()}
    row.graphs = {name: quantized.onnx for name, quantized in by_backend.items()}
    row.quantized = by_backend[this.graphs_for[0]]
    if any(one.quantization.fallbacks and one.quantization.fallbacks.layers for one in made.values()):
        row.variant = replace(row.variant, precision="mixed")


def _round(this: Build, row: Row) -> None:
    """Give the backends that compute in FP16 a graph whose float layers are FP16; an FP16 variant is built for no others."""
    fits = expectations.computes_fp16 if row.variant.precision == "fp16" else expectations.mixes_int8_with_fp16
    for name in [name for name in row.graphs if fits(this.target, name)]:
        rounded = this.steps.rounded(row.graphs[name], row.exported, this.calib, this.spec)
        row.graphs[name], row.rounded = rounded.onnx, row.rounded or rounded
    if row.variant.precision == "fp16":
        left = [name for name in row.graphs if not expectations.computes_fp16(this.target, name)]
        row.graphs = {name: onnx for name, onnx in row.graphs.items() if name not in left}
        if left:
            row.notes += (f"not built for {', '.join(left)}: what they would execute is FP32 with casts",)


def _lower(this: Build, row: Row) -> None:
    """Write what the target's TensorRT lacks with operators that it has, where there is a way."""
    for name, onnx in row.graphs.items():
        if operators := preflight.to_be_lowered(Path(onnx.path), name, this.target):
            row.graphs[name] = this.steps.lowered(onnx, operators)
            title = f"{name} {preflight.version(name, this.target)}"
            row.notes += (f"{title} has no {', '.join(operators)}: written with other operators",)


def _embed(this: Build, row: Row) -> None:
    """Give every backend its graph with the preprocessing inside; what is quantized or rounded is the inner graph."""
    row.inner, row.embedded = row.graphs, this.steps.embedded(row.exported.onnx, this.spec)
    row.graphs = {name: this.steps.embedded(onnx, this.spec).onnx for name, onnx in row.inner.items()}


def _verification_of(this: Build, variant: Variant, exact: Path | None, native: Path | None) -> VerifyRequest:
    """Return what to verify an engine on: the judged images at this resolution, and the outputs to compare with."""
    labels = this.judged.labels if this.request.data else None
    return VerifyRequest(
        pixels=str(this.steps.pixels(this.judged, this.input_size(variant), this.spec)),
        preprocessing=this.spec.preprocessing,
        reference=None if exact is None else str(exact),
        native=None if native is None else str(native),
        labels=labels,
        task=this.spec.task,
        masks=this.judged.masks,
        void=this.request.void,
        boxes=this.judged.boxes,
        frame=this.spec.native_resolution if this.spec.task == "detection" else None,
        limits=this.target.limits,
    )


def _float_engine(this: Build, row: Row) -> Built:
    """Return the variant in FP32, executed in FP32: its outputs are what the variant's engines are compared with."""
    return this.steps.built(row.exact, REFERENCE, _verification_of(this, row.variant, None, None))


def _build_engines(this: Build, row: Row, request: VerifyRequest) -> tuple[dict[str, Built], dict[str, EngineResult]]:
    """Build and verify the engines of all backends, two at a time since nothing is timed; return them and the failures.

    Raises:
        StageError: there is no engine at all, and none is left to the device.
    """
    built: dict[str, Built] = {}
    failures: dict[str, Failure] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = {
            name: pool.submit(_checked_build, this, row.graphs[name], name, request)
            for name in this.target.backends
            if name in row.graphs
        }
        for name, job in jobs.items():
            try:
                built[name] = job.result()
            except StageError as error:
                failures[name] = _failure(error, this.request)
    if not built and failures:
        first = next(iter(failures.values()))
        raise StageError(first.stage, first.message)
    return built, {name: EngineResult(backend=name, failure=failure) for name, failure in failures.items()}


def _checked_build(this: Build, onnx: OnnxModel, name: str, request: VerifyRequest) -> Built:
    """Build an engine after the pre-flight found nothing in the way.

    Raises:
        StageError: something is; the message holds all of it.
    """
    if told := preflight.obstacles(Path(onnx.path), name, this.target):
        raise StageError("preflight", "; ".join(told))
    return this.steps.built(onnx, name, request)


def _for_later(this: Build, row: Row) -> tuple[str, ...]:
    """Return the backends whose engine is built on the device, from the graph in the bundle."""
    return tuple(name for name in row.graphs if name not in this.target.backends)


def _for_the_device(this: Build, row: Row, request: VerifyRequest) -> tuple[str, ...]:
    """Say of each graph that is built on the device only whether it can be built there, and how it computes on this CPU."""
    notes = []
    for name in _for_later(this, row):
        told = preflight.obstacles(Path(row.graphs[name].path), name, this.target)
        title = f"{name} {preflight.version(name, this.target)}, on the device"
        notes.append(f"{title}: cannot be built: {'; '.join(told)}" if told else f"{title}: nothing is in the way")
        if row.variant.precision != "fp32" and not told:
            found = _verified_elsewhere(this, row, name, request)
            if found is not None and found.parity is not None:
                notes.append(f"{name}'s graph, executed on this CPU, is {found.parity.sqnr_db:.1f} dB from FP32")
            if found is not None and not found.passed:
                notes.append(f"{name}'s graph failed verification: {'; '.join(found.reasons)}")
    return tuple(notes)


def _engine_result(this: Build, row: Row, backend: str, request: VerifyRequest) -> EngineResult:
    built = row.built[backend]
    verification, engine = built.verification, built.engine
    if built.not_run is not None:
        engine = replace(engine, notes=(*engine.notes, built.not_run))
        verification = _verified_elsewhere(this, row, backend, request)
    if verification is not None and not verification.passed:
        verification = _explained(this, row, backend, verification)
    return EngineResult(backend=backend, engine=engine, verification=verification)


def _verified_elsewhere(this: Build, row: Row, backend: str, request: VerifyRequest) -> Verification | None:
    """Verify the graph of an engine whose hardware is not here by executing that very graph on the CPU."""
    found = this.steps.built(row.graphs[backend], REFERENCE, request).verification
    return None if found is None else replace(found, executed_by=f"{found.executed_by} (the same graph)")


def _explained(this: Build, row: Row, backend: str, verification: Verification) -> Verification:
    """Add to a failed INT8 verification the first layer at which the error jumps."""
    if row.quantized is None:
        return verification
    from rdeploy.quantize import recipe

    image = calibration.NormalisedImages(this.steps.pixels(this.judged, row.variant.resolution, this.spec), this.spec)[
        0
    ]
    graph = row.inner.get(backend) or row.graphs[backend]
    jump = recipe.first_divergence(Path(row.exported.onnx.path), Path(graph.path), image)
    return replace(verification, reasons=(*verification.reasons, *([jump] if jump else [])))


def native_outputs(this: Build, baseline: Row) -> Path | None:
    """Return the native model's outputs on the judged images: what every variant's decisions are compared with."""
    return _float_engine(this, baseline).outputs


def float_quality(
    this: Build, variant: Variant, native: Path | None, *, judged: ImageSet
) -> tuple[Cost, Verification | None]:
    """Return what a variant costs, and what its FP32 graph loses on some of the judged images; no engine is built.

    Args:
        native: the native model's outputs on `judged`.
    """
    exported = this.steps.exported(this.model, variant, this.judged)
    request = _verification_of(replace(this, judged=judged), variant, None, native)
    return exported.cost, this.steps.built(exported.onnx, REFERENCE, request).verification


def finish(
    this: Build, baseline: Row, rows: Sequence[tuple[Variant, Row | Failure]], notes: tuple[str, ...]
) -> BuildResult:
    """Return the result of measured rows, after their bundles were written."""
    result = _result(this, baseline, rows, notes)
    _show_disagreements(this, native_outputs(this, baseline), [row for _, row in rows if isinstance(row, Row)])
    return replace(result, variants=tuple(_bundled(this, result, row) for row in zip(result.variants, rows)))


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
    engines = tuple(row.results[name] for name in this.target.backends if name in row.results)
    return Result(
        variant=row.variant,
        target=this.target.name,
        status="ok" if any(one.engine for one in engines) or _for_later(this, row) else "failed",
        engines=tuple(sorted(engines, key=lambda one: p50_ms(one.measurement))),
        cost=row.cost,
        quantization=row.quantized.quantization if row.quantized else None,
        fp16=row.rounded.fp16 if row.rounded else None,
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
    portable = next(made.graphs[name] for name in this.graphs_for if name in made.graphs)
    placed = {one.engine.path: made.built[one.backend].folder for one in row.engines if one.engine}
    logs = {f"{name}.log": built.folder.parent / "worker.log" for name, built in made.built.items()}
    for name, built in made.built.items():  # what a builder told, and the layers that it made
        logs |= {
            f"{name}.build.log": built.folder / f"{name}.log",
            f"{name}.layers.json": built.folder / f"{name}.layers.json",
        }
    with this.steps.stage("bundle", row.variant.id):
        row = replace(row, bundle=str(folder))
        bundle.write(
            folder, result=result, row=row, onnx=Path(portable.path), engines=placed, logs=logs, graphs=made.graphs
        )
    return row


def _show_disagreements(this: Build, native: Path | None, rows: Sequence[Row]) -> None:
    """Keep beside the bundles, for the report, the images that a variant decides otherwise than the native model."""
    real_images = this.request.data or this.request.calib not in (None, calibration.RANDOM)
    if this.spec.task != "classification" or native is None or not real_images:
        return
    folder = Path(this.request.out) / disagreements.FOLDER
    for row in rows:
        outputs = next((built.outputs for built in row.built.values() if built.outputs is not None), None)
        if outputs is not None:
            file = folder / f"{_safe(this.spec.name)}-{row.variant.id}.json"
            disagreements.write(file, this.judged, outputs, native, this.spec.labels)


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
