"""A bundle or an ONNX file goes in, its engines come out measured: what `rdeploy profile` does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from rdeploy import backends, bundle, environment, preflight, runtime, serde, targets, trtexec_export, worker
from rdeploy.data import images
from rdeploy.errors import ConfigError, RdeployError
from rdeploy.results import EngineResult, Failure
from rdeploy.types import Engine, Preprocessing, Target
from rdeploy.worker.jobs import Asked, EngineJob, Entry, Measured, MeasureJob

SCENARIOS = ("SingleStream", "Offline")
_BUILD_TIMEOUT_S = 1800.0
_MEASURE_TIMEOUT_S = 7200.0
_MAX_IMAGES = 32
_ASKED_S = (0.1, 2.0)


class ProfileOptions(TypedDict, total=False):
    """The options of `rdeploy profile` with underscores; what the command line repeats takes one value or several."""

    backend: str | Sequence[str]
    target: str
    batch: int | Sequence[int]
    threads: int | None
    streams: int | Sequence[int]
    fps: float | None
    layers: bool
    end_to_end: str | os.PathLike[str] | None
    energy: bool
    mlperf: str | Sequence[str]
    out: str | os.PathLike[str] | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """An engine on its way: `place` is None where it cannot run here, `cost` what its graph needs at batch 1."""

    result: EngineResult
    place: Path | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    preprocessing: Preprocessing | None = None
    onnx: Path | None = None


def profile(path: str | Path, options: ProfileOptions) -> tuple[EngineResult, ...]:
    """Measure the engines of a bundle, or build engines of an ONNX file and measure those; all interleaved.

    Every engine is measured at every batch size. The input is seeded random numbers, except end to end. An engine that
    cannot run here, or not at a batch size, is in the result with the reason as its failure. With `out`, that folder
    gets `profile.json`, with all raw samples.

    Raises:
        ConfigError: neither a bundle nor an ONNX file, no such backend in it, or an option that cannot be.
    """
    batches = _several(options.get("batch", 1)) or (1,)
    asked, target = _asked(options), targets.load(options.get("target", "cpu"))
    target = dataclasses.replace(target, batch_sizes=tuple(batches))
    asked = dataclasses.replace(asked, seconds=min(max(2 * target.timing.min_time_s, _ASKED_S[0]), _ASKED_S[1]))
    with tempfile.TemporaryDirectory(prefix="rdeploy-profile-") as temporary:
        folder = Path(temporary)
        found = list(_engines(Path(path), _several(options.get("backend", ())), target, folder))
        entries = [_entry(one, batch, batches) for one in found if one.place is not None for batch in batches]
        job = MeasureJob(
            entries=tuple(entries),
            timing=target.timing,
            threads=options.get("threads"),
            seed=options.get("seed", 0),
            asked=asked,
        )
        measured = _measure(job, folder) if entries else {}
    results = tuple(result for one in found for result in _results(one, batches, measured))
    if (out := options.get("out")) is not None:
        _write(Path(out), results)
    return results


def _asked(options: ProfileOptions) -> Asked:
    scenarios, fps, out = _several(options.get("mlperf", ())), options.get("fps"), options.get("out")
    for name in scenarios:
        if name not in SCENARIOS:
            raise ConfigError(f"unknown MLPerf scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    if scenarios and out is None:
        raise ConfigError("MLPerf's load generator writes logs of its own: say where with --out DIR")
    if fps is not None and not 0 < fps <= 1000:
        raise ConfigError(f"a camera takes more than 0 and at most 1000 frames a second, not {fps:g}")
    source = options.get("end_to_end")
    files: tuple[str, ...] = ()
    if source is not None:
        found = images.collect(source, limit=_MAX_IMAGES, seed=options.get("seed", 0))
        if found.array is not None:
            raise ConfigError(f"{source} holds arrays, and end to end begins at image files: give a folder of images")
        files = tuple(found.paths)
    return Asked(
        energy=options.get("energy", True),
        streams=tuple(_several(options.get("streams", ()))),
        fps=fps,
        layers=options.get("layers", False),
        images=files,
        scenarios=tuple(scenarios),
        logs="" if out is None else str(Path(out) / "mlperf"),
    )


def _engines(path: Path, wanted: Sequence[str], target: Target, folder: Path) -> Iterable[_Found]:
    if bundle.is_bundle(path):
        return _of_bundle(path, wanted)
    if path.suffix == ".onnx" and path.is_file():
        built = [_build_engine(path, name, target, folder) for name in wanted or target.backends]
        weights, activations = _cost(path) if any(one.place for one in built) else (None, None)
        facts: dict[str, Any] = {"weights_bytes": weights, "activation_bytes": activations, "onnx": path}
        return [dataclasses.replace(one, **facts) for one in built]
    raise ConfigError(f"{path}: neither a bundle nor an ONNX file; `rdeploy build` makes a bundle of a model")


def _of_bundle(path: Path, wanted: Sequence[str]) -> Iterable[_Found]:
    folder = bundle.folder_of(path)
    manifest = bundle.read(folder)
    entries = [*runtime.to_be_built(manifest, wanted), *manifest["engines"]]
    names = [entry["backend"] for entry in entries]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"{folder}: this bundle has no {name}; its engines: {', '.join(names) or 'none'}")
    for entry in entries:
        if not wanted or entry["backend"] in wanted:
            yield _engine_of_bundle(folder, manifest, entry)
    for one in trtexec_export.of_bundle(folder, manifest) if not wanted else ():
        yield _Found(result=one)


def _engine_of_bundle(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> _Found:
    """Return an engine with its file, or with the reason why it cannot be run; one built here has the size of its file."""
    name, engine = entry["backend"], bundle.engine(entry) if "path" in entry else None
    try:
        file, said = runtime.usable(folder, manifest, entry)
    except RdeployError as error:
        file, said = None, str(error)
    if file is None:
        failure = Failure(stage="measure", error="MissingDependency", message=said or "")
        return _Found(result=EngineResult(backend=name, engine=engine, failure=failure))
    cost = manifest.get("cost") or {}
    return _Found(
        result=EngineResult(backend=name, engine=engine),
        place=file,
        weights_bytes=cost.get("weight_bytes"),
        activation_bytes=cost.get("activation_bytes"),
        preprocessing=bundle.preprocessing(manifest),
        onnx=folder / "model.onnx",
    )


def _build_engine(onnx: Path, name: str, target: Target, folder: Path) -> _Found:
    place = folder / name
    try:
        if reason := backends.find(name).unavailable():
            failure = Failure(stage="build", error="MissingDependency", message=reason)
            return _Found(result=EngineResult(backend=name, failure=failure))
        preflight.check(onnx, name, target)
        job = EngineJob(backend=name, onnx=str(onnx), directory=str(place), target=target)
        answer = worker.call(serde.to_json(job), directory=place / "job", timeout_s=_BUILD_TIMEOUT_S)
    except RdeployError as error:
        return _Found(result=EngineResult(backend=name, failure=_failure("build", error)))
    engine = serde.from_json(Engine, answer["engine"], where=name)
    if reason := answer["not_run"]:
        failure = Failure(stage="measure", error="Unsupported", message=reason)
        return _Found(result=EngineResult(backend=name, engine=engine, failure=failure))
    return _Found(result=EngineResult(backend=name, engine=engine), place=place / engine.path)


def _cost(onnx: Path) -> tuple[int | None, int | None]:
    """Return weight and activation bytes of an ONNX file, where the onnx package is here to count them."""
    with contextlib.suppress(ImportError, RdeployError):
        from rdeploy.graph import cost

        found = cost.summarize(onnx)
        return found.weight_bytes, found.activation_bytes
    return None, None


def _entry(one: _Found, batch: int, batches: Sequence[int]) -> Entry:
    activations = one.activation_bytes
    return Entry(
        name=_name(one.result.backend, batch, batches),
        backend=one.result.backend,
        path=str(one.place),
        batch=batch,
        weights_bytes=one.weights_bytes,
        activation_bytes=None if activations is None else activations * batch,
        build_peak_bytes=one.result.engine.build_peak_bytes if one.result.engine else None,
        preprocessing=one.preprocessing,
        onnx=None if one.onnx is None else str(one.onnx),
    )


def _name(backend: str, batch: int, batches: Sequence[int]) -> str:
    return backend if len(batches) == 1 else f"{backend}-batch{batch}"


def _measure(job: MeasureJob, folder: Path) -> dict[str, Measured]:
    answer = worker.call(serde.to_json(job), directory=folder / "measure", timeout_s=_MEASURE_TIMEOUT_S)
    found = [serde.from_json(Measured, entry, where="measure") for entry in answer["entries"]]
    return {entry.name: entry for entry in found}


def _results(one: _Found, batches: Sequence[int], measured: Mapping[str, Measured]) -> Iterable[EngineResult]:
    if one.place is None:
        yield one.result
        return
    for batch in batches:
        found = measured[_name(one.result.backend, batch, batches)]
        yield dataclasses.replace(one.result, measurement=found.measurement, failure=found.failure)


def _write(out: Path, results: Sequence[EngineResult]) -> None:
    content = {"environment": dict(environment.describe()), "engines": results}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "profile.json").write_text(serde.dumps(content), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}") from error


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else (value,)


def _failure(stage: str, error: RdeployError) -> Failure:
    place = getattr(error, "stage", stage)
    return Failure(stage=place, error=type(error).__name__, message=str(error).removeprefix(f"{place}: "))
