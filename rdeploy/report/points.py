"""A run's manifests go in, one flat row for each engine comes out: what the plots, the tables and the CSV are made of."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rdeploy import pareto
from rdeploy.measured import LayerTimes
from rdeploy.types import engine_name, format_size

Manifest = Mapping[str, Any]
NATIVE = "native"
"""What the native model is called among the variants."""
NO_BUNDLE = "no bundle"
"""The status of a point that a search measured, briefly, and that is no answer."""


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

    @property
    def name(self) -> str:
        """What its variant is called: `r168-int8`; `native` where a search took the native model as it is."""
        variant = str(self.manifest["variant"]["id"])
        native = variant == (self.manifest.get("baseline") or {}).get("id")
        return NATIVE if native and not any(e.get("comparison") for e in self.manifest["engines"]) else variant


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
    on_front: bool = False


def points(bundles: Sequence[Bundle]) -> tuple[Point, ...]:
    """Return the engines of a run in which nothing was chosen: the fastest of the front, if not native, is marked as the pick."""
    found = rows(bundles)
    on_front = front(found)
    pick = next((one.id for one in on_front if one.variant != NATIVE), None)
    return marked(found, on_front=[one.id for one in on_front], pick=pick)


def rows(bundles: Sequence[Bundle]) -> tuple[Point, ...]:
    """Return the native baseline's engines and every engine of every bundle, each once."""
    if not bundles:
        return ()
    others = [bundle.manifest for bundle in bundles if bundle.name != NATIVE]
    found = [*_native(bundles), *(_point(one, engine) for one in others for engine in one["engines"])]
    return tuple({one.id: one for one in found}.values())


def marked(found: Iterable[Point], *, on_front: Collection[str], pick: str | None) -> tuple[Point, ...]:
    """Return the points with their roles; a native engine is called native wherever it lies, unless it is the pick."""

    def role(one: Point) -> str:
        if one.id == pick:
            return "pick"
        return NATIVE if one.variant == NATIVE else "front" if one.id in on_front else ""

    return tuple(replace(one, role=role(one), on_front=one.id in on_front) for one in found)


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


def metric(bundles: Sequence[Bundle]) -> str:
    """Return how the run's accuracy axis is called: the labelled metric where there is one, else the agreement."""
    names = {"top1": "top-1", "miou": "mIoU", "map": "mAP", "agreement": "agreement with native"}
    found = str(next((one["metric"] for one in _scored(bundles)), "accuracy"))
    return names.get(found, found)


def _scored(bundles: Sequence[Bundle]) -> Iterator[Mapping[str, Any]]:
    """Yield what the engines of a run were scored with; the native model alone, without labels, agrees with itself."""
    for engine in (engine for bundle in bundles for engine in bundle.manifest["engines"]):
        verification = engine.get("verification") or {}
        if found := verification.get("accuracy") or verification.get("agreement"):
            yield found
    if bundles and all(bundle.name == NATIVE for bundle in bundles):
        yield {"metric": "agreement", "reference": 1.0}


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


def _native(bundles: Sequence[Bundle]) -> tuple[Point, ...]:
    """Return the native model's engines; their accuracy is what the variants were compared with."""
    manifest = bundles[0].manifest
    baseline = manifest.get("baseline") or {}
    if not baseline:
        return ()
    height, width = baseline["resolution"]
    measured = baseline.get("measurement") or {}
    reference = _percent(next((one.get("reference") for one in _scored(bundles)), None))
    found = []
    for engine in baseline.get("engines") or ():
        twin = engine["backend"] == baseline.get("backend")
        found.append(
            Point(
                id=engine_id(manifest, NATIVE, engine["backend"]),
                variant=NATIVE,
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
