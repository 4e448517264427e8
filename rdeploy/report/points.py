"""A run's manifests go in, one flat row for each engine comes out: what the plots, the tables and the CSV are made of."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rdeploy import pareto
from rdeploy.measured import LayerTimes
from rdeploy.types import engine_name, format_size

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One bundle of a run: its manifest, the raw latencies by backend, and what it was seen to decide differently."""

    folder: str
    manifest: Manifest
    latencies_ms: Mapping[str, Sequence[float]]
    baseline_ms: Mapping[str, Sequence[float]]
    disagreements: Sequence[Mapping[str, Any]] = ()
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)
    """Backend -> the variant's times by layer, where they were measured; `baseline_layers` are the native model's."""
    baseline_layers: Mapping[str, LayerTimes] = field(default_factory=dict)
    tensors: Sequence[Mapping[str, Any]] = ()
    """What rounding does to each tensor of an INT8 variant (`quantize.explain.Tensor`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One engine. Accuracies are per cent; None where nothing was measured. `role` is native, front, pick or empty."""

    id: str
    variant: str
    backend: str
    batch: int = 1
    resolution: str
    side: int
    precision: str
    position: str
    p50_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    verdict: str = ""
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    parity_db: float | None = None
    weights_mb: float | None = None
    activations_mb: float | None = None
    workspace_mb: float | None = None
    peak_mb: float | None = None
    size_mb: float | None = None
    gmacs: float | None = None
    usability: str = ""
    """The verdict on the variant: usable, needs fine-tuning, dominated."""
    status: str = ""
    role: str = ""


def points(bundles: Sequence[Bundle], *, picked: str | None = None) -> tuple[Point, ...]:
    """Return the native baseline's engines and every engine of every bundle, those of the front marked.

    Args:
        picked: `Point.id` of the run's pick; the fastest point of the front that passed where the run names none.
    """
    if not bundles:
        return ()
    native = _native(bundles[0].manifest)
    found = [*native, *(_point(b.manifest, engine) for b in bundles for engine in b.manifest["engines"])]
    unique = list({one.id: one for one in found}.values())
    on_front = front(unique)
    roles = {one.id: "front" for one in on_front} | {one.id: "native" for one in native}
    pick = picked or next((one.id for one in on_front if one.id not in {n.id for n in native}), None)
    if pick is not None:
        roles[pick] = "pick"
    return tuple(replace(one, role=roles.get(one.id, "")) for one in unique)


def front(found: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other beats in both latency and accuracy, fastest first; failed ones are left out."""
    usable = [one for one in found if one.p50_ms is not None and one.accuracy is not None and not one.status]
    return pareto.front(usable, cost=lambda one: one.p50_ms or 0.0, loss=lambda one: -(one.accuracy or 0.0))


def engine_id(manifest: Manifest, variant: str, backend: str) -> str:
    """Return how an engine of a run is called: `r168-int8@openvino`, with `-batch8` where that is what was measured."""
    return f"{variant}@{engine_name(backend, _batch(manifest))}"


def _batch(manifest: Manifest) -> int:
    """Return how many images a run took: one build measures all its engines alike."""
    measured = (engine.get("measurement") or {} for engine in manifest["engines"])
    return next((int(one["batch"]) for one in measured if one.get("batch")), 1)


def metric(manifest: Manifest) -> str:
    """Return how the run's accuracy axis is called: the labelled metric where there is one, else the agreement."""
    for engine in manifest["engines"]:
        verification = engine.get("verification") or {}
        if found := verification.get("accuracy") or verification.get("agreement"):
            names = {"top1": "top-1", "miou": "mIoU", "map": "mAP", "agreement": "agreement with native"}
            return names.get(str(found["metric"]), str(found["metric"]))
    return "accuracy"


def to_markdown(found: Sequence[Point], *, metric: str, reason: str = "") -> str:
    """Return the points as a Markdown table, the pick in bold."""
    heads = ("engine", "px", "p50 ms", "speed-up [95 %]", f"{metric} % [95 %]", "peak MB", "size MB", "GMACs", "")
    lines = [reason, ""] if reason else []
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in found:
        name = f"**{one.id}**" if one.role == "pick" else one.id
        cells = (
            name,
            one.resolution,
            _number(one.p50_ms, ".2f"),
            _ranged(one.speedup, one.speedup_low, one.speedup_high, ".2f"),
            _ranged(one.accuracy, one.accuracy_low, one.accuracy_high, ".1f"),
            _number(one.peak_mb, ".0f"),
            _number(one.size_mb, ".1f"),
            _number(one.gmacs, ".2f"),
            one.status or one.role,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, kind: str) -> str:
    return "–" if value is None else f"{value:{kind}}"


def _ranged(value: float | None, low: float | None, high: float | None, kind: str) -> str:
    if value is None or low is None or high is None:
        return _number(value, kind)
    return f"{value:{kind}} [{low:{kind}}, {high:{kind}}]"


def to_csv(found: Iterable[Point]) -> str:
    """Return the points as CSV with a header; empty cells where nothing was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in found)
    return text.getvalue()


_FAILED = "verification failed"


def _point(manifest: Manifest, engine: Mapping[str, Any]) -> Point:
    variant, measured = manifest["variant"], engine.get("measurement") or {}
    verification, comparison = engine.get("verification") or {}, engine.get("comparison") or {}
    scored = verification.get("accuracy") or verification.get("agreement") or {}
    low, high = scored.get("ci95") or (None, None)
    slow, fast = comparison.get("speedup_ci95") or (None, None)
    status = _status(engine)
    height, width = variant["resolution"]
    return Point(
        id=engine_id(manifest, variant["id"], engine["backend"]),
        variant=variant["id"],
        backend=engine["backend"],
        batch=_batch(manifest),
        resolution=format_size((height, width)),
        side=min(height, width),
        precision=variant["precision"],
        position=variant.get("method") or "input",
        p50_ms=measured.get("p50_ms"),
        speedup=comparison.get("speedup"),
        speedup_low=slow,
        speedup_high=fast,
        verdict=comparison.get("verdict") or "",
        accuracy=_percent(scored.get("value")),
        accuracy_low=_percent(low),
        accuracy_high=_percent(high),
        parity_db=(verification.get("parity") or {}).get("sqnr_db"),
        **_memory(measured.get("memory") or {}),
        size_mb=_mega(engine.get("size_bytes")),
        gmacs=_giga((manifest.get("cost") or {}).get("macs")),
        usability="" if status == _FAILED else (manifest.get("verdict") or {}).get("verdict", ""),
        status=status,
    )


def _native(manifest: Manifest) -> tuple[Point, ...]:
    """Return the native model's engines; their accuracy is what the variants were compared with."""
    baseline = manifest.get("baseline") or {}
    if not baseline:
        return ()
    height, width = baseline["resolution"]
    measured = baseline.get("measurement") or {}
    reference = _reference(manifest)
    found = []
    for engine in baseline.get("engines") or ():
        twin = engine["backend"] == baseline.get("backend")
        found.append(
            Point(
                id=engine_id(manifest, "native", engine["backend"]),
                variant="native",
                backend=engine["backend"],
                batch=_batch(manifest),
                resolution=format_size((height, width)),
                side=min(height, width),
                precision=baseline["precision"],
                position="input",
                p50_ms=engine.get("p50_ms"),
                accuracy=reference,
                **(_memory(measured.get("memory") or {}) if twin else {}),
                size_mb=_mega(engine.get("size_bytes")),
                gmacs=_giga((baseline.get("cost") or {}).get("macs")),
            )
        )
    return tuple(found)


def _reference(manifest: Manifest) -> float | None:
    for engine in manifest["engines"]:
        verification = engine.get("verification") or {}
        if scored := verification.get("accuracy") or verification.get("agreement"):
            return _percent(scored.get("reference"))
    return None


def _status(engine: Mapping[str, Any]) -> str:
    verification = engine.get("verification")
    if verification is not None and not verification["passed"]:
        return _FAILED
    if engine.get("measurement") is None:
        return f"built for {', '.join(engine['built_for'])}" if engine.get("built_for") else "not measured"
    return ""


def _memory(memory: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "weights_mb": "weights",
        "activations_mb": "activations",
        "workspace_mb": "workspace",
        "peak_mb": "process_peak",
    }
    return {name: _mega(memory.get(key)) for name, key in names.items()}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _mega(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / 1e6


def _giga(count: float | None) -> float | None:
    return None if count is None else count / 1e9
