"""A bundle, a manifest or a baseline JSON file goes in, a `Snapshot` comes out; and a snapshot becomes a baseline file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdeploy import bundle, environment, manifest, serde
from rdeploy.errors import ConfigError
from rdeploy.snapshot import SCHEMA_VERSION, EngineFacts, Launch, Share, Snapshot, Speedup

_MAX_BYTES = 64 << 20
_COST = ("macs", "params", "weight_bytes", "activation_bytes")
_KEPT_FACTS = (
    "cpu",
    "cpu_flags",
    "threads",
    "cpu_quota",
    "gpu",
    "board",
    "driver",
    "os",
    "python",
    "runtimes",
    "rdeploy",
)


def read(path: str | Path) -> Snapshot:
    """Return the snapshot of a bundle (its folder), a manifest file, or a baseline JSON file.

    Raises:
        ConfigError: there is no such file, or it is none of the three.
    """
    place = Path(path)
    if bundle.is_bundle(place):
        return of_bundle(bundle.folder_of(place))
    if place.is_dir():
        raise ConfigError(f"{path}: not a bundle, there is no manifest.json in it; `rdeploy build` writes one")
    content = _content(place)
    if "machine" in content and "counts" in content:
        return _of_baseline(content, str(path))
    if "engines" in content and "variant" in content:
        return of_manifest(bundle.parse(place), {})
    raise ConfigError(f"{path}: neither a manifest nor a baseline; `rdeploy check BUNDLE --write-baseline` writes one")


def of_bundle(folder: Path) -> Snapshot:
    """Return the snapshot of a bundle: its manifest, its raw measurements, and what is counted in its graph."""
    content = bundle.read(folder)
    raw = folder / "measurements.json"
    found = of_manifest(content, _content(raw) if raw.is_file() else {})
    return Snapshot(
        name=found.name,
        created=found.created,
        machine=found.machine,
        counts={**found.counts, **_counted(folder / "model.onnx")},
        engines=found.engines,
        command=found.command,
    )


def of_manifest(content: Mapping[str, Any], raw: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot of a manifest; `raw` is the content of the bundle's measurements.json, or empty."""
    cost = content.get("cost") or {}
    counts = {name: cost[name] for name in _COST if cost.get(name) is not None}
    if (coverage := (content["variant"].get("quantization") or {}).get("coverage")) is not None:
        counts["qdq_coverage"] = coverage
    if onnx := content.get("onnx"):
        counts["onnx_bytes"] = onnx["size_bytes"]
    facts = content.get("environment") or {}
    return Snapshot(
        name=f"{content['model']['name']} {content['variant'].get('id', '')}".strip(),
        created=content.get("created", ""),
        machine={name: facts[name] for name in _KEPT_FACTS if name in facts},
        counts=counts,
        engines=tuple(_engine(entry, raw, facts.get("threads")) for entry in content["engines"]),
        command=content.get("reproduce", ""),
    )


def here() -> dict[str, Any]:
    """Return the facts of this machine that a snapshot keeps; its name only as a hash."""
    facts = manifest.mapping(environment.describe())
    host = hashlib.sha256(platform.node().encode()).hexdigest()[:12]
    return {"host": host, **{name: facts[name] for name in _KEPT_FACTS if name in facts}}


def write(path: str | Path, snapshot: Snapshot) -> None:
    """Write a baseline JSON file in one rename.

    Raises:
        ConfigError: the place cannot be written to.
    """
    place = Path(path)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(serde.dumps(snapshot), encoding="utf-8")
        temporary.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write the baseline {path}: {error.strerror}") from error


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so neither a manifest nor a baseline")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: neither a manifest nor a baseline, but a JSON {type(found).__name__}")
    return found


def _of_baseline(content: dict[str, Any], path: str) -> Snapshot:
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path}: schema_version {version}, this rdeploy reads {SCHEMA_VERSION}; write it again")
    again = "write it again with --write-baseline"
    try:
        found = serde.from_json(Snapshot, content, where=path)
        numbers = [*found.counts.values(), *(x for one in found.engines for x in _numbers(one))]
    except (TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: not a baseline file ({error}); {again}") from error
    wrong = [
        x for x in numbers if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) or x < 0
    ]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]!r} stands where a number of 0 or more belongs; {again}")
    return found


def _numbers(engine: EngineFacts) -> list[Any]:
    found: list[Any] = [] if engine.size_bytes is None else [engine.size_bytes]
    for launch in (*engine.launches, *engine.native):
        found += [x for block in launch.blocks_ms for x in block]
        found += [x for x in (launch.process_peak_bytes, launch.build_s) if x is not None]
    for share in (engine.accuracy, engine.agreement):
        found += [] if share is None else [share.right, share.samples]
    if engine.speedup is not None:
        found += [engine.speedup.value, *engine.speedup.ci95]
    return found


def _counted(onnx: Path) -> dict[str, float]:
    """Return how many nodes a graph has besides Q/DQ; nothing where the package that reads graphs is not installed."""
    if not onnx.is_file():
        return {}
    try:
        from rdeploy.graph import cost
    except ModuleNotFoundError:
        return {}
    try:
        return {"nodes": len(cost.layers(onnx))}
    except Exception as error:  # whatever a parser raises on a damaged file
        raise ConfigError(f"{onnx}: cannot be read as a graph ({type(error).__name__})") from error


def _engine(entry: Mapping[str, Any], raw: Mapping[str, Any], cores: int | None) -> EngineFacts:
    backend, measured = entry["backend"], entry.get("measurement") or {}
    verification = entry.get("verification") or {}
    reasons = "; ".join(verification.get("reasons") or ()) or "no reason given"
    return EngineFacts(
        backend=backend,
        load=measured.get("load"),
        cores=cores,
        backend_version=entry["backend_version"],
        size_bytes=entry["size_bytes"],
        batch=measured.get("batch", 1),
        threads=measured.get("threads"),
        definition=measured.get("definition", ""),
        failure="" if verification.get("passed", True) else f"verification refused it: {reasons}",
        launches=_launch(measured, (raw.get("engines") or {}).get(backend), entry.get("build_s")),
        native=_launch({}, (raw.get("baseline") or {}).get(backend), None),
        speedup=_speedup(entry.get("comparison")),
        accuracy=_share(verification.get("accuracy")),
        agreement=_share(verification.get("agreement")),
    )


def _launch(measured: Mapping[str, Any], raw: Mapping[str, Any] | None, build_s: float | None) -> tuple[Launch, ...]:
    """Return the one launch of a build: the raw latencies, or only the median where those are not there."""
    latencies = (raw or {}).get("latencies_ms") or [x for x in (measured.get("p50_ms"),) if x]
    memory = (raw or {}).get("memory") or measured.get("memory") or {}
    if not latencies and build_s is None:
        return ()
    blocks = (tuple(latencies),) if latencies else ()
    return (Launch(blocks_ms=blocks, process_peak_bytes=memory.get("process_peak"), build_s=build_s),)


def _speedup(comparison: Mapping[str, Any] | None) -> Speedup | None:
    if comparison is None:
        return None
    low, high = comparison["speedup_ci95"]
    return Speedup(value=comparison["speedup"], ci95=(low, high), memory_ratio=comparison.get("memory_ratio"))


def _share(accuracy: Mapping[str, Any] | None) -> Share | None:
    if accuracy is None:
        return None
    return Share(right=round(accuracy["value"] * accuracy["samples"]), samples=accuracy["samples"])
