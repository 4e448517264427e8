"""The line from a trained model to its bundles: load, resize, export, quantize, build, verify, measure, bundle.

`build` is the loop over variants around `run_variant`, which is the line itself. A variant that fails becomes a row with
its stage and its reason and takes nobody down; only what the baseline needs ends the build.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rdeploy import adaptation, compare, expectations, resize
from rdeploy.build_request import BuildRequest
from rdeploy.compare import Row, measure_rows
from rdeploy.data import calibration
from rdeploy.errors import ConfigError, MissingDependency, RdeployError
from rdeploy.intake import Build, take_in
from rdeploy.pipeline import advice, engines, graphs, outcome
from rdeploy.results import BuildResult, Failure
from rdeploy.steps import export, places
from rdeploy.types import QuantOptions, Variant, format_size

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
CACHE_BYTES = 20 << 30


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
    notes = (*advice.expected(this, native), *notes, *advice.batches(this.target, this.target.batch_sizes[:1]))
    baseline = run_variant(this, native, reference=None)
    outputs = engines.native_outputs(this, baseline)
    notes += advice.preprocessing(this, baseline)
    rows, same = _built_once([(variant, contained(this, variant, outputs)) for variant in variants(this)])
    notes += same
    built = [row for _, row in rows if isinstance(row, Row)]
    twins = _twins(this, built, outputs)
    measure_rows(this, [baseline, *built, *twins], layers=True)
    recommended = compare.recommendations(this, [baseline, *built, *twins])
    result = replace(outcome.judged(this, baseline, rows, notes), recommendations=recommended)
    result = replace(result, timings_s=outcome.timings(this.steps, started))
    result = replace(result, variants=tuple(outcome.bundled(this, result, row) for row in zip(result.variants, rows)))
    outcome.show_disagreements(this, outputs, [row for _, row in rows if isinstance(row, Row)])
    this.steps.store.prune(CACHE_BYTES)
    return result


def run_variant(this: Build, variant: Variant, *, reference: Path | None, only: Collection[str] | None = None) -> Row:
    """Take one variant down the line, from the model to verified engines.

    Args:
        reference: the native model's outputs on the judged images; None when this variant is the native one.
        only: the backends to build engines for; all of the target's where nothing is said.
    """
    exported = export.exported(this.steps, this.model, variant, this.judged)
    row = Row(variant=variant, exported=exported, graphs=dict.fromkeys(this.graphs_for, exported.onnx))
    if variant.precision in ("int8", "mixed"):
        graphs.quantize_graphs(this, row)
    if variant.precision != "fp32":
        graphs.round_graphs(this, row)
    if variant.embeds_preprocessing:
        graphs.embed_preprocessing(this, row)
    graphs.lower_graphs(this, row)
    request = engines.verification_of(this, variant, engines.float_engine(this, row).outputs, reference)
    row.notes += engines.for_the_device(this, row, request)
    row.built, failed = engines.build(this, row, request, only)
    row.results = failed | {name: engines.result(this, row, name, request) for name in row.built}
    return row


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
        for asked, precision in itertools.product(wanted, request.precisions):
            plain = Variant(
                resolution=native,
                precision=precision,
                quant=quant if precision == "int8" else None,
                embeds_preprocessing=request.embed_preprocess,
            )
            found.append(resize.variant_of(plain, asked, native))
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
    settled = places.settled(this.steps, this.model, variant, images)
    native, notes = this.spec.native_resolution, []
    asked_for = {place.at: place.resolution for place in resize.places_of(variant, native)}
    for after in resize.places_of(settled, native):
        where = "" if after.at == resize.INPUT else f" at {after.at}"
        if asked_for[after.at] != after.resolution:
            asked, got = format_size(asked_for[after.at]), format_size(after.resolution)
            notes.append(f"{asked} was asked for{where}; {got} is the nearest that this model can take")
        notes += filter(None, [resize.said(after)])
    return settled, tuple(notes)


def contained(
    this: Build, variant: Variant, reference: Path | None, only: Collection[str] | None = None
) -> Row | Failure:
    """Run a variant; whatever goes wrong in it becomes its failure."""
    try:
        if variant.precision == "fp16" and (
            reason := expectations.no_fp16(replace(this.target, backends=this.graphs_for))
        ):
            return Failure(stage="fp16", error="Unsupported", message=reason)
        settled, notes = settled_variant(this, variant)
        settled, ladder = adaptation.adapted(this, settled)
        row = run_variant(this, settled, reference=reference, only=only)
        row.notes, row.adaptation = (*notes, *row.notes), ladder
        return row
    except (ConfigError, MissingDependency) as error:
        raise error
    except RdeployError as error:
        return engines.failure_of(error, this.request)
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
