"""What was found out about one variant goes in, the mapping that becomes `manifest.json` comes out."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rdeploy import __version__, measure
from rdeploy.measured import Measurement
from rdeploy.results import BuildResult, EngineResult, Failure, Recommendation, Result, Verification
from rdeploy.serde import to_json
from rdeploy.types import Engine, ModelSpec, Variant

SCHEMA_VERSION = 1

_ENVIRONMENT = ("cpu", "gpu", "driver", "runtimes", "python", "threads", "load")


Files = Mapping[str, Sequence[Mapping[str, Any]]]


def manifest(result: BuildResult, row: Result, *, files: Files | None = None) -> dict[str, Any]:
    """Return the manifest of one variant as plain JSON values.

    Args:
        files: per backend, what lies in the bundle for its engine: {path, sha256, size_bytes}.
    """
    built = ranked(row, backends=result.target.backends)
    best = top(row)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rdeploy_version": __version__,
        "environment": _environment(result, best),
        "target": row.target,
        "build": _build(result),
        "model": _model(result.spec, row.variant),
        "variant": _variant(row),
        "cost": to_json(row.cost),
        "engines": [_engine(one, (files or {}).get(one.backend, ())) for one in built],
        "baseline": _baseline(result.baseline, best),
        "comparison": to_json(best.comparison) if best else None,
        "recommendation": to_json(recommended(result, row)),
        "verdict": to_json(row.usability),
        "failures": _failures(row),
        "notes": [*result.notes, *row.notes],
        "timings_s": mapping(result.timings_s),
        "reproduce": row.reproduce,
    }


def ranked(row: Result, *, backends: Sequence[str] = ()) -> tuple[EngineResult, ...]:
    """Return the engines that were built, in the order in which a machine should try them.

    First those for the hardware that the target names but that is not here (where one of them can run, it is what the
    target is for), then the measured ones, fastest first, then the unmeasured; those that failed verification are last.
    """
    order = {name: index for index, name in enumerate(backends)}

    def key(one: EngineResult) -> tuple[Any, ...]:
        elsewhere = one.measurement is None and bool(one.engine and one.engine.built_for)
        time_ms = p50_ms(one.measurement) if one.measurement else float("inf")
        return (failed(one), not elsewhere, time_ms, order.get(one.backend, len(order)))

    return tuple(sorted((one for one in row.engines if one.engine is not None), key=key))


def top(row: Result) -> EngineResult | None:
    """Return the fastest engine that was measured here and passed verification, or None."""
    measured = [one for one in row.engines if one.engine and one.measurement and not failed(one)]
    return min(measured, key=lambda one: p50_ms(one.measurement), default=None)


def failed(one: EngineResult) -> bool:
    """Say whether verification refused this engine; one that could not be verified here has not failed."""
    return one.verification is not None and not one.verification.passed


def recommended(result: BuildResult, row: Result) -> Recommendation | None:
    """Return which precision to deploy at the place of a row."""
    return next((one for one in result.recommendations if one.place == row.variant.place), None)


def executed_instead(precision: str, one: EngineResult) -> str | None:
    """Return the float type that a runtime computed in where another was asked for: OpenVINO takes bf16 for FP32."""
    executed = dict(one.engine.executed_precision) if one.engine else {}
    return "bf16" if executed.get("bf16") and precision != "bf16" else None


def p50_ms(measurement: Measurement | None) -> float:
    """Return the median latency; infinity where nothing was measured."""
    return statistics.median(measurement.latencies_ms) if measurement and measurement.latencies_ms else float("inf")


def same_backend(baseline: Result, backend: str) -> EngineResult | None:
    """Return the baseline's engine on one backend: the only one that an engine may be compared with."""
    return next((one for one in baseline.engines if one.backend == backend and one.engine is not None), None)


def engine_path(engine: Engine) -> str:
    """Return where an engine lies inside a bundle."""
    return f"engines/{engine.backend}/{engine.path}"


def samples(result: BuildResult, row: Result) -> dict[str, Any]:
    """Return the raw latencies of the variant and of the baseline: the content of `measurements.json`."""
    return {"engines": _raw(row.engines), "baseline": _raw(result.baseline.engines)}


def _raw(engines: Iterable[EngineResult]) -> dict[str, Any]:
    return {one.backend: to_json(one.measurement) for one in engines if one.measurement is not None}


def _build(result: BuildResult) -> dict[str, Any]:
    """Return what a device needs to know to build an engine again as it was built here."""
    options = {name: dict(given) for name, given in result.target.backend_options}
    return {"batch_sizes": list(result.target.batch_sizes), "backend_options": to_json(options)}


def _environment(result: BuildResult, best: EngineResult | None) -> dict[str, Any]:
    found = {**dict.fromkeys(_ENVIRONMENT), **mapping(result.environment)}
    if best and best.measurement:
        for name, value in (("threads", best.measurement.threads), ("load", best.measurement.load)):
            found[name] = value if found[name] is None else found[name]
    return found


def _model(spec: ModelSpec, variant: Variant) -> dict[str, Any]:
    return {
        "name": spec.name,
        "source": spec.source,
        "sha256": spec.sha256,
        "task": spec.task,
        "native_resolution": list(spec.native_resolution),
        "channels": spec.channels,
        "classes": len(spec.labels) or None,
        "assumed": list(spec.assumed),
        "preprocessing": _preprocessing(spec, variant),
    }


def _preprocessing(spec: ModelSpec, variant: Variant) -> dict[str, Any]:
    """Return what images go through on their way into the engine; with the resize inside, its filter as `inside`."""
    own = variant.preprocessing or spec.preprocessing
    if not variant.embeds_preprocessing:
        return {**to_json(own), **_input(spec, variant)}
    inside = {"interpolation": own.interpolation, "antialias": own.antialias}
    return {**to_json(spec.preprocessing), **_input(spec, variant), "inside": inside}


def _input(spec: ModelSpec, variant: Variant) -> dict[str, Any]:
    """Return what goes into the engine: normalised images, or pictures that are resized and normalised inside."""
    if variant.embeds_preprocessing:
        size = list(spec.native_resolution)
        return {"layout": "NHWC", "range": [0, 255], "dtype": "uint8", "input_size": size, "embedded": True}
    return {"layout": "NCHW", "range": [0.0, 1.0], "dtype": "float32", "embedded": False}


def _variant(row: Result) -> dict[str, Any]:
    variant: Variant = row.variant
    quantization = to_json(row.quantization)
    if row.quantization is not None:
        if (fallbacks := row.quantization.fallbacks) is not None:
            layers = [{"layer": layer, "error_share": share} for layer, share in fallbacks.layers]
            quantization["fallbacks"] = {**quantization["fallbacks"], "layers": layers}
        quantization["skipped"] = [{"layer": layer, "reason": why} for layer, why in row.quantization.skipped]
    return {
        "id": variant.id,
        "status": row.status,
        "resolution": list(variant.resolution),
        "method": variant.at,
        "method_options": mapping(variant.resize_options),
        "precision": variant.precision,
        "quantization": quantization,
        "fp16": _fp16(row),
        "adaptation": to_json(row.adaptation),
    }


def _fp16(row: Result) -> dict[str, Any] | None:
    if row.fp16 is None:
        return None
    return {**to_json(row.fp16), "kept": [{"layer": layer, "reason": why} for layer, why in row.fp16.kept]}


def _engine(one: EngineResult, files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    engine = one.engine
    assert engine is not None  # `ranked` leaves the others out
    return {
        "backend": engine.backend,
        "backend_version": engine.backend_version,
        "path": engine_path(engine),
        "sha256": engine.sha256,
        "size_bytes": engine.size_bytes,
        "files": [dict(file) for file in files],
        "source_sha256": engine.source_sha256,
        "device": engine.device,
        "built_for": list(engine.built_for) or None,
        "fingerprint": mapping(engine.fingerprint),
        "executed_precision": mapping(engine.executed_precision),
        "build_s": engine.build_s,
        "build_peak_bytes": engine.build_peak_bytes,
        "build_device_peak_bytes": engine.build_device_peak_bytes,
        "notes": list(engine.notes),
        "verification": _verification(one.verification),
        "measurement": _without_layers(one.measurement) if one.measurement else None,
        "not_run": _not_run(one),
        "comparison": to_json(one.comparison),
    }


def _not_run(one: EngineResult) -> str | None:
    if one.measurement is not None or one.engine is None:
        return None
    if one.failure is not None:
        return one.failure.message
    if one.engine.notes:
        return "; ".join(one.engine.notes)
    return f"built for {', '.join(one.engine.built_for)}, which is not here" if one.engine.built_for else "not measured"


def _verification(verification: Verification | None) -> dict[str, Any] | None:
    return None if verification is None else dict(to_json(verification))


def measured(measurement: Measurement) -> dict[str, Any]:
    """Return one measurement for the manifest: derived statistics, without the raw samples."""
    summary = measure.summary(measurement.latencies_ms, batch=measurement.batch)
    notes = summary.pop("reasons")
    return {
        "batch": measurement.batch,
        "threads": measurement.threads,
        **{name: to_json(value) for name, value in summary.items()},
        "percentile_notes": notes,
        "warmup": measurement.warmup,
        "stable": measurement.stable,
        "load": measurement.load,
        "clock_mhz": measurement.clock_mhz,
        "definition": measurement.definition,
        "memory": {**to_json(measurement.memory), "method": mapping(measurement.memory.method)},
        "fit": not measurement.unfit,
        "unfit": list(measurement.unfit),
        "machine": mapping(measurement.machine),
        "device": _device(measurement),
        **_asked_for(measurement),
        "notes": list(measurement.notes),
    }


def _without_layers(measurement: Measurement) -> dict[str, Any]:
    """Return one measurement without the times by layer: `measurements.json` has them."""
    return measured(dataclasses.replace(measurement, layers=None))


def _device(measurement: Measurement) -> dict[str, Any]:
    """Return the same latencies on the device's own clock; without one, the reason."""
    latencies = measurement.device_latencies_ms
    p50 = statistics.median(latencies) if latencies else None
    return {"p50_ms": p50, "samples": len(latencies), "clock": measurement.device_clock or "not asked for"}


def _asked_for(measurement: Measurement) -> dict[str, Any]:
    """Return what is measured only on request, by name, without raw samples; what was not asked for is left out."""
    found: dict[str, Any] = {name: getattr(measurement, name) for name in ("energy", "layers")}
    found["throughput"] = measurement.throughput or None
    found["scenarios"] = measurement.scenarios or None
    found = {name: to_json(value) for name, value in found.items() if value is not None}
    if energy := measurement.energy:
        found["energy"]["domains"] = mapping(energy.domains)
    if (paced := measurement.paced) is not None:
        found["paced"] = _medians(to_json(paced))
    if (end_to_end := measurement.end_to_end) is not None:
        found["end_to_end"] = _medians(to_json(end_to_end))
    return found


def _medians(values: dict[str, Any]) -> dict[str, Any]:
    """Replace raw samples (lists under a name in ms) by their median under that name, None where there are none."""
    raw = {name: value for name, value in values.items() if name.endswith("_ms") and isinstance(value, list)}
    return {**values, **{name: statistics.median(value) if value else None for name, value in raw.items()}}


def _baseline(baseline: Result, best: EngineResult | None) -> dict[str, Any]:
    twin = same_backend(baseline, best.backend) if best else next((o for o in baseline.engines if o.engine), None)
    return {
        "id": baseline.variant.id,
        "status": baseline.status,
        "resolution": list(baseline.variant.resolution),
        "precision": baseline.variant.precision,
        "cost": to_json(baseline.cost),
        "backend": twin.backend if twin else None,
        "size_bytes": twin.engine.size_bytes if twin and twin.engine else None,
        "executed_precision": mapping(twin.engine.executed_precision) if twin and twin.engine else {},
        "measurement": _without_layers(twin.measurement) if twin and twin.measurement else None,
        "engines": [_baseline_engine(one) for one in baseline.engines if one.engine is not None],
    }


def _baseline_engine(one: EngineResult) -> dict[str, Any]:
    size_bytes = one.engine.size_bytes if one.engine else None
    p50 = p50_ms(one.measurement) if one.measurement else None
    return {"backend": one.backend, "size_bytes": size_bytes, "p50_ms": to_json(p50)}


def _failures(row: Result) -> list[dict[str, Any]]:
    found: list[tuple[str | None, Failure | None]] = [(None, row.failure)]
    found += [(one.backend, one.failure) for one in row.engines]
    return [{"backend": backend, **to_json(failure)} for backend, failure in found if failure is not None]


def mapping(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Turn key/value pairs into plain JSON values; values that are pairs themselves become objects too."""
    return {str(key): mapping(value) if _is_pairs(value) else to_json(value) for key, value in pairs}


def _is_pairs(value: Any) -> bool:
    pairs = isinstance(value, tuple) and bool(value)
    return pairs and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value)
