"""A bundle is a folder that explains itself: one variant's engines, its manifest, report and reproduce command.

`write` makes one from a build's result, all or nothing; `read` and `verified_engine` open one that may come from
anybody.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rdeploy import manifest, serde, store, trtexec
from rdeploy.errors import ConfigError
from rdeploy.manifest import SCHEMA_VERSION
from rdeploy.results import BuildResult, Result
from rdeploy.types import Engine, OnnxModel, Preprocessing, Size

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
CHANGED = "it is not what was built"
"""In the message of every file of a bundle that was damaged: such a bundle is refused, not worked around."""
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_SIDE = 16384
_MAX_NUMBER = 1e4
_REBUILD = "copy the bundle again or rebuild it with its reproduce.sh"


def write(
    directory: Path,
    *,
    result: BuildResult,
    row: Result,
    onnx: Path,
    engines: Mapping[str, Path],
    logs: Mapping[str, Path] | None = None,
    graphs: Mapping[str, OnnxModel] | None = None,
) -> Path:
    """Write the bundle of one variant and return its folder; an older bundle there is replaced in one rename.

    Args:
        onnx: the variant's portable graph, FP32 or Q/DQ; it becomes `model.onnx`.
        engines: `Engine.path` -> the folder in which it lies.
        logs: file name -> log file; those that do not exist are left out.
        graphs: backend -> the graph that its engine is built from, also where it was not built here. With one for
            TensorRT the bundle has `build-engine.sh`.

    Raises:
        ConfigError: the place cannot be written to, is full, or holds something that is not a bundle.
    """
    _refuse_to_replace(directory)
    with store.atomic_folder(directory, replace=True) as folder:
        content = _fill(folder, result=result, row=row, onnx=onnx, engines=engines)
        content["graphs"] = _copy_graphs(folder, graphs or {}, result, row)
        for name, log in (logs or {}).items():
            if log.is_file():
                _copy(log, folder / "logs" / name)
        _write_page(folder, content)
        (folder / MANIFEST).write_text(serde.dumps(content), encoding="utf-8")
        seal(folder)
    return directory


def seal(folder: Path) -> None:
    """Write SHA256SUMS over all files of a bundle (`sha256sum -c SHA256SUMS` checks it); `read` refuses another manifest."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    lines = [f"{serde.file_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a bundle (its folder, or its manifest.json), checked for what its readers rely on.

    Raises:
        ConfigError: there is no bundle, or its manifest is damaged, of another version, or points outside the bundle.
    """
    folder = folder_of(path)
    content = parse(folder / MANIFEST)
    _check_sum(folder)
    return content


def parse(file: Path) -> dict[str, Any]:
    """Return the content of a manifest file, wherever it lies, checked as `read` does, by itself.

    Raises:
        ConfigError: as for `read`.
    """
    try:
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ConfigError(f"{file}: too large for a manifest; {_REBUILD}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); {_REBUILD}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    _check(content, file)
    return dict(content)


def folder_of(path: str | Path) -> Path:
    """Return the folder of a bundle.

    Raises:
        ConfigError: nothing is there, or it is not a bundle.
    """
    folder = Path(path)
    if folder.name == MANIFEST and folder.is_file():
        folder = folder.parent
    if not folder.exists():
        raise ConfigError(f"{path}: no such bundle; `rdeploy build` writes one")
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{path}: not a bundle, there is no {MANIFEST} in it; `rdeploy build` writes one")
    return folder


def is_bundle(path: str | Path) -> bool:
    """Say whether a path is a bundle's folder or its manifest."""
    folder = Path(path)
    return (folder / MANIFEST).is_file() or (folder.name == MANIFEST and folder.is_file())


def verified_engine(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Return the path of one engine of the manifest after its files were found to be what was built.

    Raises:
        ConfigError: a file is missing, truncated, changed, or outside the bundle.
    """
    for file in entry["files"]:
        place = _inside(folder, file["path"])
        if not place.is_file():
            raise ConfigError(f"{folder}: {file['path']} is missing, {CHANGED}; {_REBUILD}")
        if place.stat().st_size != file["size_bytes"] or serde.file_sha256(place) != file["sha256"]:
            raise ConfigError(f"{folder}: {file['path']} was truncated or changed, {CHANGED}; {_REBUILD}")
    return _inside(folder, entry["path"])


def verified_graph(folder: Path, manifest: Mapping[str, Any], backend: str) -> Path:
    """Return the path of the graph that a backend's engine is built from, after it was found to be what was written.

    Raises:
        ConfigError: the bundle has none, or it is missing, truncated, changed, or outside the bundle.
    """
    graph = next((one for one in manifest.get("graphs") or () if one["backend"] == backend), None)
    if graph is None:
        raise ConfigError(f"{folder}: this bundle does not hold the graph of {backend}; {_REBUILD}")
    return verified_engine(folder, {"path": graph["path"], "files": [graph]})


def engine(entry: Mapping[str, Any]) -> Engine:
    """Rebuild the `Engine` of a manifest entry; its path is relative to the bundle."""
    values = {name: entry[name] for name in ("path", "sha256", "size_bytes", "backend", "backend_version")}
    return Engine(
        **values,
        source_sha256=entry.get("source_sha256", ""),
        build_s=entry.get("build_s", 0.0),
        build_peak_bytes=entry.get("build_peak_bytes"),
        build_device_peak_bytes=entry.get("build_device_peak_bytes"),
        device=entry.get("device") or "",
        built_for=tuple(entry.get("built_for") or ()),
        executed_precision=tuple((entry.get("executed_precision") or {}).items()),
        notes=tuple(entry.get("notes") or ()),
        fingerprint=tuple((entry.get("fingerprint") or {}).items()),
    )


def preprocessing(manifest: Mapping[str, Any]) -> Preprocessing:
    """Return what images go through on their way into the engines of a manifest."""
    described = manifest["model"]["preprocessing"]
    return Preprocessing(
        mean=tuple(described["mean"]),
        std=tuple(described["std"]),
        interpolation=described["interpolation"],
        crop_pct=described["crop_pct"],
        crop_mode=described.get("crop_mode", "center"),
        antialias=described.get("antialias", True),
    )


def input_size(manifest: Mapping[str, Any]) -> Size:
    """Return the (h, w) to which images are brought before they go into the engines of a manifest."""
    described = manifest["model"]["preprocessing"]
    height, width = described["input_size"] if described.get("embedded") else manifest["variant"]["resolution"]
    return int(height), int(width)


def labels(folder: Path) -> tuple[str, ...]:
    """Return the class names of a bundle, one per line of labels.txt; empty where there are none."""
    file = folder / "labels.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()


def _refuse_to_replace(directory: Path) -> None:
    if directory.is_dir() and not is_bundle(directory) and any(directory.iterdir()):
        raise ConfigError(f"{directory}: exists and is not a bundle, it is left alone; choose another --out")


def _fill(folder: Path, *, result: BuildResult, row: Result, onnx: Path, engines: Mapping[str, Path]) -> dict[str, Any]:
    from rdeploy.report import markdown  # a device that only runs a bundle does not load it

    files = {e.backend: _copy_engine(engines[e.path] / e.path, folder, e) for e in _built(row)}
    content = manifest.manifest(result, row, files=files)
    _copy(onnx, folder / "model.onnx")
    content["onnx"] = _describe(folder / "model.onnx", folder)
    if result.spec.labels:
        lines = [" ".join(label.split()) for label in result.spec.labels]
        (folder / "labels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "measurements.json").write_text(serde.dumps(manifest.samples(result, row)), encoding="utf-8")
    (folder / "report.md").write_text(markdown.render(dataclasses.replace(result, variants=(row,))), encoding="utf-8")
    script = folder / "reproduce.sh"
    script.write_text(_script(row.reproduce), encoding="utf-8")
    script.chmod(0o755)
    (folder / "logs").mkdir(exist_ok=True)
    return content


def _write_page(folder: Path, content: Mapping[str, Any]) -> None:
    """Write report.html where the `report` extra is installed; `rdeploy report BUNDLE` writes one beside the bundle later."""
    from rdeploy.report import html, points, samples

    if html.unavailable():
        return
    bare = points.Bundle(folder=folder.name, manifest=serde.to_json(content), latencies_ms={}, baseline_ms={})
    errors = folder / "logs" / "quantization.json"
    measurements = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
    told = json.loads(errors.read_text(encoding="utf-8")) if errors.is_file() else None
    page = html.render([samples.with_samples(bare, measurements, told)])
    (folder / "report.html").write_text(page, encoding="utf-8")


def _copy_graphs(
    folder: Path, graphs: Mapping[str, OnnxModel], result: BuildResult, row: Result
) -> list[dict[str, Any]]:
    """Put every backend's graph into the bundle, each content once, and TensorRT's build script; return what is where."""
    placed = {serde.file_sha256(folder / "model.onnx"): folder / "model.onnx"}
    found = []
    for backend, graph in graphs.items():
        if graph.sha256 not in placed:
            placed[graph.sha256] = _copy(Path(graph.path), folder / "graphs" / f"{backend}.onnx")
        described = _describe(placed[graph.sha256], folder)
        tensors = {"inputs": serde.to_json(graph.inputs), "outputs": serde.to_json(graph.outputs)}
        found.append({"backend": backend, **described, **tensors})
        if backend == "tensorrt":
            _write_build_script(folder, described["path"], graph, result, row)
    return found


def _write_build_script(folder: Path, onnx: str, graph: OnnxModel, result: BuildResult, row: Result) -> None:
    precision, holds_fp16 = row.variant.precision, row.fp16 is not None
    text = trtexec.script(onnx, graph.sha256, graph.inputs, result.target, precision=precision, holds_fp16=holds_fp16)
    (folder / trtexec.SCRIPT).write_text(text, encoding="utf-8")
    (folder / trtexec.SCRIPT).chmod(0o755)


def _check_sum(folder: Path) -> None:
    """Refuse a manifest that is not the one that SHA256SUMS was written over.

    Raises:
        ConfigError: it was truncated or changed.
    """
    sums = folder / SUMS
    if not sums.is_file():  # bundles of rdeploy 0.1 have none
        return
    known = {name: digest for digest, _, name in (line.partition("  ") for line in sums.read_text().splitlines())}
    if known.get(MANIFEST) != serde.file_sha256(folder / MANIFEST):
        raise ConfigError(f"{folder / MANIFEST}: was truncated or changed, {CHANGED}; {_REBUILD}")


def _built(row: Result) -> tuple[Engine, ...]:
    return tuple(one.engine for one in row.engines if one.engine is not None)


def _copy_engine(source: Path, folder: Path, built: Engine) -> list[dict[str, Any]]:
    """Copy an engine and what belongs to it (`openvino.bin` beside `openvino.xml`); return the files' descriptions."""
    # The source folder is where the engine was built: logs and job files of the build lie there too and stay behind.
    target = folder / "engines" / built.backend / built.path
    if source.is_dir():
        shutil.copytree(source, target)
        return [_describe(file, folder) for file in sorted(target.rglob("*")) if file.is_file()]
    parts = [part for part in sorted(source.parent.glob("*")) if part.is_file() and _belongs(part.name, source)]
    return [_describe(_copy(part, target.with_name(part.name)), folder) for part in parts]


def _belongs(name: str, source: Path) -> bool:
    side_file = name.startswith((f"{source.stem}.", f"{source.name}.")) and not name.endswith((".log", ".json"))
    return name == source.name or side_file


def _copy(source: Path, target: Path) -> Path:
    # A copy, never a hard link: what somebody changes in a bundle must not change the cache that it came from.
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def _describe(file: Path, folder: Path) -> dict[str, Any]:
    path = file.relative_to(folder).as_posix()
    return {"path": path, "sha256": serde.file_sha256(file), "size_bytes": file.stat().st_size}


def _script(command: str) -> str:
    # Split and joined again, so that whatever the command holds, the script runs one program with quoted arguments.
    quoted = shlex.join(shlex.split(command)) or "rdeploy --version"
    return f'#!/bin/sh\n# Builds this bundle again; run it in the folder where it was built.\nexec {quoted} "$@"\n'


def _check(content: Any, file: Path) -> None:
    """Check what a reader relies on; the JSON Schema that ships with the package says all of it."""
    version = _field(content, "schema_version", int, file)
    if version > SCHEMA_VERSION:
        raise ConfigError(f"{file}: schema_version {version}, this rdeploy reads {SCHEMA_VERSION}; upgrade rdeploy")
    model, variant = _field(content, "model", dict, file), _field(content, "variant", dict, file)
    for name in ("name", "task"):
        _field(model, name, str, file)
    preprocessing = _field(model, "preprocessing", dict, file)
    sizes = {"resolution": _field(variant, "resolution", list, file)}
    if preprocessing.get("embedded"):
        sizes["input_size"] = _field(preprocessing, "input_size", list, file)
    for name, size in sizes.items():
        if len(size) != 2 or not all(type(side) is int and 0 < side <= _MAX_SIDE for side in size):
            raise ConfigError(f"{file}: {name} must be two sides of 1 to {_MAX_SIDE} pixels, not {size}; {_REBUILD}")
    _field(preprocessing, "interpolation", str, file)
    # A tiny crop_pct would have every image enlarged until memory is full.
    _check_numbers([preprocessing.get("crop_pct")], "crop_pct", file, low=0.1)
    _check_numbers(_field(preprocessing, "mean", list, file), "mean", file, low=-10.0)
    _check_numbers(_field(preprocessing, "std", list, file), "std", file, low=1e-6)
    for entry in _field(content, "engines", list, file):
        _check_engine(entry, file)
    for graph in content.get("graphs") or ():
        _field(graph, "backend", str, file)
        _check_file(graph, file)


def _check_engine(entry: Any, file: Path) -> None:
    for name in ("backend", "path", "sha256", "backend_version"):
        _field(entry, name, str, file)
    _field(entry, "size_bytes", int, file)
    parts = _field(entry, "files", list, file)
    for part in parts:
        _check_file(part, file)
    covered = any(PurePosixPath(part["path"]).is_relative_to(entry["path"]) for part in parts)
    if not covered:
        raise ConfigError(f"{file}: the engine {entry['path']} is not among its files; {_REBUILD}")


def _check_file(part: Any, file: Path) -> None:
    _inside(file.parent, _field(part, "path", str, file))
    _field(part, "sha256", str, file)
    _field(part, "size_bytes", int, file)


def _field(mapping: Any, key: str, kind: type, file: Path) -> Any:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{file}: {key} is missing or not of type {kind.__name__}; {_REBUILD}")
    return value


def _check_numbers(values: Sequence[Any], name: str, file: Path, *, low: float) -> None:
    good = (type(value) in (int, float) and low <= value <= _MAX_NUMBER for value in values)
    if not values or not all(good):
        raise ConfigError(f"{file}: {name} must be numbers of at least {low:g}, not {list(values)}; {_REBUILD}")


def _inside(folder: Path, relative: str) -> Path:
    """Return a path below the bundle; a manifest from elsewhere must not name other files of this machine."""
    place = (folder / relative).resolve()
    if PurePosixPath(relative).is_absolute() or not place.is_relative_to(folder.resolve()):
        raise ConfigError(f"{folder / MANIFEST}: {relative!r} points outside the bundle; do not use this bundle")
    return place
