"""From measured rows to what a build returns and leaves on disk: results, bundles, the images decided otherwise."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rdeploy import bundle, disagreements, environment, quantization_errors, usability
from rdeploy.compare import Row
from rdeploy.intake import Build
from rdeploy.manifest import p50_ms
from rdeploy.pipeline import engines
from rdeploy.results import BuildResult, Failure, Result
from rdeploy.steps import Steps
from rdeploy.types import Variant


def finish(
    this: Build, baseline: Row, rows: Sequence[tuple[Variant, Row | Failure]], notes: tuple[str, ...]
) -> BuildResult:
    """Return the result of measured rows, after their bundles were written."""
    result = judged(this, baseline, rows, notes)
    show_disagreements(this, engines.native_outputs(this, baseline), [row for _, row in rows if isinstance(row, Row)])
    return replace(result, variants=tuple(bundled(this, result, row) for row in zip(result.variants, rows)))


def judged(
    this: Build, baseline: Row, rows: Sequence[tuple[Variant, Row | Failure]], notes: tuple[str, ...]
) -> BuildResult:
    """Return the result of measured rows, with a verdict on each variant where there were real images to judge on."""
    result = BuildResult(
        spec=this.spec,
        target=this.target,
        baseline=_row_result(this, baseline),
        variants=tuple(
            _row_result(this, row) if isinstance(row, Row) else _failed(this, variant, row) for variant, row in rows
        ),
        environment=environment.describe(),
        notes=notes,
    )
    return usability.judge(result) if this.has_real_images else result


def _row_result(this: Build, row: Row) -> Result:
    built = tuple(row.results[name] for name in this.target.backends if name in row.results)
    return Result(
        variant=row.variant,
        target=this.target.name,
        status="ok" if any(one.engine for one in built) or engines.for_later(this, row) else "failed",
        engines=tuple(sorted(built, key=lambda one: p50_ms(one.measurement))),
        cost=row.cost,
        quantization=row.quantized.quantization if row.quantized else None,
        fp16=row.rounded.fp16 if row.rounded else None,
        adaptation=row.adaptation,
        reproduce=this.request.command,
        notes=row.notes,
    )


def _failed(this: Build, variant: Variant, failure: Failure) -> Result:
    status = "unsupported" if failure.error == "Unsupported" else "failed"
    return Result(
        variant=variant, target=this.target.name, status=status, failure=failure, reproduce=this.request.command
    )


def bundled(this: Build, result: BuildResult, pair: tuple[Result, tuple[Variant, Row | Failure]]) -> Result:
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
    if (explained := quantization_errors.written(this, made)) is not None:
        logs[quantization_errors.FILE] = explained
    with this.steps.stage("bundle", row.variant.id):
        row = replace(row, bundle=str(folder))
        bundle.write(
            folder, result=result, row=row, onnx=Path(portable.path), engines=placed, logs=logs, graphs=made.graphs
        )
    return row


def show_disagreements(this: Build, native: Path | None, rows: Sequence[Row]) -> None:
    """Keep beside the bundles, for the report, the images that a variant decides otherwise than the native model."""
    if native is None or not this.has_real_images:
        return
    pixels = this.steps.pixels(this.judged, this.spec.native_resolution, this.spec)
    folder = Path(this.request.out) / disagreements.FOLDER
    for row in rows:
        outputs = next((built.outputs for built in row.built.values() if built.outputs is not None), None)
        if outputs is not None:
            file = folder / f"{_safe(this.spec.name)}-{row.variant.id}.json"
            task = this.spec.task
            disagreements.write(file, this.judged, outputs, native, this.spec.labels, task=task, pixels=pixels)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def timings(steps: Steps, started: float) -> tuple[tuple[str, float], ...]:
    total = time.perf_counter() - started
    other = max(0.0, total - sum(steps.timings.values()))
    return (
        *((name, round(s, 3)) for name, s in steps.timings.items()),
        ("other", round(other, 3)),
        ("total", round(total, 3)),
    )
