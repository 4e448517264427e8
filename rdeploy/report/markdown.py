"""A build's result goes in, a short Markdown report comes out; the command line's table is made of the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rdeploy import manifest
from rdeploy.measured import Measurement
from rdeploy.report import ladder, precision
from rdeploy.results import Accuracy, BuildResult, Comparison, EngineResult, Failure, Result
from rdeploy.types import format_size

_NONE = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine of one variant as text, in the columns of the table; `status` is empty where all went well."""

    variant: str
    resolution: str
    precision: str
    backend: str
    p50_ms: str = _NONE
    speedup: str = _NONE
    interval: str = ""
    memory_mb: str = _NONE
    size_mb: str = _NONE
    gmacs: str = _NONE
    accuracy: str = _NONE
    agreement: str = _NONE
    parity_db: str = _NONE
    executed: str = ""
    """What was executed where that is not what was asked for: bf16."""
    verdict: str = ""
    """Whether the variant is fit for use."""
    status: str = ""


def table(result: BuildResult) -> tuple[Row, ...]:
    """Return the rows: the native FP32 baseline first, then every engine of every variant, best first."""
    rows: list[Row] = []
    for one in (result.baseline, *result.variants):
        name = "native" if one is result.baseline else one.variant.id
        engines = (*manifest.ranked(one, backends=result.target.backends), *_not_built(one))
        rows += [_row(name, one, engine) for engine in engines]
        if not engines:
            rows.append(_row(name, one, EngineResult(backend=_NONE, failure=one.failure)))
    return tuple(rows)


def render(result: BuildResult) -> str:
    """Return the report: the model, the table, what to know about it, failures, timings, the machine."""
    spec = result.spec
    parts = [
        f"# {spec.name}: {len(result.variants)} variant{'s' * (len(result.variants) != 1)} for {result.target.name}",
        f"`{spec.source}`, {spec.task}, native resolution {format_size(spec.native_resolution)}, "
        f"sha256 `{spec.sha256[:12]}`.",
        _markdown_table(table(result), spec.task),
        _legend(result),
        _section("Verdict", ladder.verdicts(result)),
        ladder.table(result),
        _section("Which precision", precision.recommendations(result)),
        _section("Calibration", _calibration(result)),
        _section("FP16", precision.fp16(result)),
        _section("Mixed precision", precision.fallbacks(result)),
        _section("To know", _notes(result)),
        _section("Failures", _failures(result)),
        _section("Where the time went", [f"{name}: {seconds:.1f} s" for name, seconds in result.timings_s]),
        _section("Machine", [f"{key}: {_flat(value)}" for key, value in manifest.mapping(result.environment).items()]),
        _section("Reproduce", [f"`{one.reproduce}`" for one in result.variants[:1] if one.reproduce]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _not_built(row: Result) -> tuple[EngineResult, ...]:
    return tuple(one for one in row.engines if one.engine is None)


def _row(name: str, row: Result, one: EngineResult) -> Row:
    verification = one.verification
    speedup, interval = _speedup(one.comparison)
    parity = verification.parity if verification else None
    return Row(
        variant=name,
        resolution=format_size(row.variant.resolution),
        precision=row.variant.precision,
        backend=one.backend,
        p50_ms=_p50(one.measurement),
        speedup=speedup,
        interval=interval,
        memory_mb=_megabytes(_peak(one.measurement)),
        size_mb=_megabytes(one.engine.size_bytes if one.engine else None),
        gmacs=f"{row.cost.macs / 1e9:.2f}" if row.cost else _NONE,
        accuracy=_percent(verification.accuracy if verification else None),
        agreement=_percent(verification.agreement if verification else None),
        parity_db=f"{parity.sqnr_db:.1f}" if parity else _NONE,
        verdict=row.usability.verdict if row.usability and not manifest.failed(one) else "",
        executed=manifest.executed_instead(row.variant.precision, one) or "",
        status=_status(row, one),
    )


def _status(row: Result, one: EngineResult) -> str:
    if failure := one.failure or (row.failure if one.engine is None else None):
        return f"{failure.stage} failed"
    if manifest.failed(one):
        return "verification failed"
    if one.engine and one.measurement is None:
        return f"built for {', '.join(one.engine.built_for)}" if one.engine.built_for else "not measured"
    return "" if row.status == "ok" else row.status


def _speedup(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return _NONE, ""
    low, high = comparison.speedup_ci95
    return f"{comparison.speedup:.2f}x {comparison.verdict}", f"[{low:.2f}, {high:.2f}]"


def _percent(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return _NONE
    low, high = (100 * bound for bound in accuracy.ci95)
    digits = 2 if accuracy.metric == "cosine" else 1
    return f"{100 * accuracy.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _peak(measurement: Measurement | None) -> int | None:
    return measurement.memory.process_peak if measurement else None


def _megabytes(size_bytes: int | None) -> str:
    return _NONE if size_bytes is None else f"{size_bytes / 1e6:.1f}"


_COLUMNS = {
    "variant": "variant",
    "resolution": "px",
    "precision": "precision",
    "backend": "backend",
    "p50_ms": "p50 ms",
    "speedup": "speed-up [95 %]",
    "memory_mb": "peak MB",
    "size_mb": "size MB",
    "gmacs": "GMACs",
    "accuracy": "top-1 % [95 %]",
    "agreement": "agrees with native % [95 %]",
    "parity_db": "parity dB",
    "verdict": "verdict",
    "status": "",
}


METRICS = {"classification": "top-1 %", "segmentation": "mIoU %", "detection": "mAP %", "embedding": "accuracy %"}
"""How the labelled score of each task is called."""


def agreement_name(task: str) -> str:
    """Return what is compared with the native model in a task."""
    return "cosine with native %" if task == "embedding" else "agrees with native %"


def _markdown_table(rows: Iterable[Row], task: str) -> str:
    heads = {**_COLUMNS, "accuracy": f"{METRICS[task]} [95 %]", "agreement": f"{agreement_name(task)} [95 %]"}
    lines = ["| " + " | ".join(heads.values()) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in rows:
        cells = {name: getattr(row, name) for name in _COLUMNS}
        cells["speedup"] = f"{row.speedup} {row.interval}".strip()
        if row.executed:
            cells["precision"] = f"{row.precision} asked, {row.executed} executed"
        lines.append("| " + " | ".join(_cell(cells[name]) for name in _COLUMNS) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _legend(result: BuildResult) -> str:
    counts = sorted({str(a.samples) for a in _accuracies(result)}, key=int)
    scored = f" Scored on {', '.join(counts)} images." if counts else ""
    return (
        "Speed-up is against the native FP32 model on the same backend, from interleaved runs, with a 95 % bootstrap "
        "interval; *inconclusive* means that the interval holds 1. Peak is the memory of a process with this engine "
        "alone. Parity is the signal-to-noise ratio of the outputs against the same variant in FP32." + scored
    )


def _accuracies(result: BuildResult) -> Iterable[Accuracy]:
    for row in (result.baseline, *result.variants):
        for one in row.engines:
            if one.verification:
                yield from (a for a in (one.verification.accuracy, one.verification.agreement) if a)


def _calibration(result: BuildResult) -> list[str]:
    lines = []
    for row in result.variants:
        if (found := row.quantization) is None:
            continue
        covered = f"{100 * found.coverage:.1f} % of the MACs in INT8"
        lines.append(
            ", ".join([f"{row.variant.id}: {found.calibrator}, {found.samples} images", covered, *found.recipe])
        )
        lines += [f"{row.variant.id}: {name} left in float: {reason}" for name, reason in found.skipped[:_MAX_LAYERS]]
        more = len(found.skipped) - _MAX_LAYERS
        lines += [f"{row.variant.id}: {more} more layers left in float, see manifest.json"] * (more > 0)
    return lines


_MAX_LAYERS = 5


def _notes(result: BuildResult) -> list[str]:
    assumed = f"Assumed, because nobody said so: {', '.join(result.spec.assumed)}." if result.spec.assumed else ""
    lines = [assumed, *result.notes]
    for row in (result.baseline, *result.variants):
        lines += [f"{row.variant.id}: {note}" for note in row.notes]
        for one in row.engines:
            unstable = one.measurement is not None and not one.measurement.stable
            lines += [f"{row.variant.id} on {one.backend}: the latency did not settle before measuring"] * unstable
    return [line for line in dict.fromkeys([*lines, *doubts(result)]) if line]


def doubts(result: BuildResult) -> tuple[str, ...]:
    """Return why the machine was not fit to measure on, each reason once; such latencies have a star in the table."""
    engines = (one for row in (result.baseline, *result.variants) for one in row.engines)
    reasons = (reason for one in engines if one.measurement for reason in one.measurement.unfit)
    return tuple(f"* the machine was not fit to measure on: {reason}" for reason in dict.fromkeys(reasons))


def _p50(measurement: Measurement | None) -> str:
    if measurement is None:
        return _NONE
    return f"{manifest.p50_ms(measurement):.2f}" + "*" * bool(measurement.unfit)


def failures(result: BuildResult) -> tuple[tuple[str, Failure], ...]:
    """Return every failure with the name of its variant, and of its backend where only one failed."""
    found: list[tuple[str, Failure]] = []
    for row in (result.baseline, *result.variants):
        name = row.variant.id
        found += [(name, row.failure)] if row.failure else []
        for one in row.engines:
            found += [(f"{name} on {one.backend}", one.failure)] if one.failure else []
            if one.verification and manifest.failed(one):
                reasons = "; ".join(one.verification.reasons) or "no reason given"
                found.append((f"{name} on {one.backend}", Failure(stage="verify", error="", message=reasons)))
    return tuple(found)


def _failures(result: BuildResult) -> list[str]:
    lines = []
    for name, failure in failures(result):
        again = failure.reproduce and f"; again with `{failure.reproduce}`"
        lines.append(f"{name}: {failure.stage}: {failure.message}{again}")
    return lines


def _section(title: str, lines: Iterable[str]) -> str:
    items = [f"- {' '.join(line.split())}" for line in lines]
    return "\n".join([f"## {title}", "", *items]) if items else ""


def _flat(value: Any) -> str:
    """Return nested facts on one line: `{"openvino": "2026.1"}` reads `openvino 2026.1`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value)
    return _NONE if value is None else str(value)
