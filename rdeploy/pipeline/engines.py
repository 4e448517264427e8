"""Build and verify the engines of a row, and say of those that are left to the device what can be said here."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rdeploy import preflight
from rdeploy.build_request import BuildRequest
from rdeploy.compare import Row
from rdeploy.data import calibration
from rdeploy.data.images import ImageSet
from rdeploy.errors import RdeployError, StageError, Unsupported
from rdeploy.intake import REFERENCE, Build
from rdeploy.results import Cost, EngineResult, Failure, Verification
from rdeploy.steps import engine, export
from rdeploy.steps.made import Built
from rdeploy.types import OnnxModel, Variant
from rdeploy.worker import JobFailed
from rdeploy.worker.jobs import VerifyRequest

_AT_ONCE = 2


def verification_of(this: Build, variant: Variant, exact: Path | None, native: Path | None) -> VerifyRequest:
    """Return what to verify an engine on: the judged images at this resolution, and the outputs to compare with."""
    labels = this.judged.labels if this.request.data else None
    spec = this.fed(variant)
    return VerifyRequest(
        pixels=str(this.steps.pixels(this.judged, this.input_size(variant), spec)),
        preprocessing=spec.preprocessing,
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


def float_engine(this: Build, row: Row) -> Built:
    """Return the variant in FP32, executed in FP32: its outputs are what the variant's engines are compared with."""
    return engine.built(this.steps, row.exact, REFERENCE, verification_of(this, row.variant, None, None))


def native_outputs(this: Build, baseline: Row) -> Path | None:
    """Return the native model's outputs on the judged images: what every variant's decisions are compared with."""
    return float_engine(this, baseline).outputs


def float_quality(
    this: Build, variant: Variant, native: Path | None, *, judged: ImageSet
) -> tuple[Cost, Verification | None]:
    """Return what a variant costs, and what its FP32 graph loses on some of the judged images; no engine is built.

    Args:
        native: the native model's outputs on `judged`.
    """
    exported = export.exported(this.steps, this.model, variant, this.judged)
    request = verification_of(replace(this, judged=judged), variant, None, native)
    return exported.cost, engine.built(this.steps, exported.onnx, REFERENCE, request).verification


def build(
    this: Build, row: Row, request: VerifyRequest, only: Collection[str] | None = None
) -> tuple[dict[str, Built], dict[str, EngineResult]]:
    """Build and verify the engines of all backends, or of `only` some, two at a time; return them and the failures.

    Raises:
        StageError: there is no engine at all, and none is left to the device.
    """
    built: dict[str, Built] = {}
    failures: dict[str, Failure] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = {
            name: pool.submit(_checked_build, this, row.graphs[name], name, request)
            for name in this.target.backends
            if name in row.graphs and (only is None or name in only)
        }
        for name, job in jobs.items():
            try:
                built[name] = job.result()
            except StageError as error:
                failures[name] = failure_of(error, this.request)
    if not built and failures:
        first = next(iter(failures.values()))
        raise StageError(first.stage, first.message)
    return built, {name: EngineResult(backend=name, failure=failure) for name, failure in failures.items()}


def _checked_build(this: Build, onnx: OnnxModel, name: str, request: VerifyRequest) -> Built:
    """Build an engine after the pre-flight found nothing in the way.

    Raises:
        StageError: something is; the message holds all of it.
    """
    preflight.check(Path(onnx.path), name, this.target)
    return engine.built(this.steps, onnx, name, request)


def for_later(this: Build, row: Row) -> tuple[str, ...]:
    """Return the backends whose engine is built on the device, from the graph in the bundle."""
    return tuple(name for name in row.graphs if name not in this.target.backends)


def for_the_device(this: Build, row: Row, request: VerifyRequest) -> tuple[str, ...]:
    """Say of each graph that is built on the device only whether it can be built there, and how it computes on this CPU."""
    notes = []
    for name in for_later(this, row):
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


def result(this: Build, row: Row, backend: str, request: VerifyRequest) -> EngineResult:
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
    found = engine.built(this.steps, row.graphs[backend], REFERENCE, request).verification
    return None if found is None else replace(found, executed_by=f"{found.executed_by} (the same graph)")


def _explained(this: Build, row: Row, backend: str, verification: Verification) -> Verification:
    """Add to a failed INT8 verification the first layer at which the error jumps."""
    if row.quantized is None:
        return verification
    from rdeploy.quantize import judge

    spec = this.spec_of(row.variant)
    image = calibration.NormalisedImages(this.steps.pixels(this.judged, row.variant.resolution, spec), spec)[0]
    graph = row.inner.get(backend) or row.graphs[backend]
    jump = judge.first_divergence(Path(row.exported.onnx.path), Path(graph.path), image)
    return replace(verification, reasons=(*verification.reasons, *([jump] if jump else [])))


def failure_of(error: RdeployError, request: BuildRequest) -> Failure:
    stage = error.stage if isinstance(error, (StageError, Unsupported)) else "variant"
    kind = error.error if isinstance(error, JobFailed) else type(error).__name__
    again = error.reproduce if isinstance(error, JobFailed) else request.command
    return Failure(stage=stage, error=kind, message=str(error).removeprefix(f"{stage}: "), reproduce=again)
