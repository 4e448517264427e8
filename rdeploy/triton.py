"""A bundle goes in, a model of a Triton repository comes out: `NAME/config.pbtxt`, `NAME/1/model.*`, `NAME/labels.txt`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import backends, bundle, rebuild, store
from rdeploy.errors import ConfigError, Unsupported
from rdeploy.types import TensorInfo

CONFIG = "config.pbtxt"


@dataclass(frozen=True, slots=True)
class _Server:
    """How Triton serves what one of our backends builds."""

    line: str
    file: str
    device: str


_SERVERS = {
    "tensorrt": _Server('platform: "tensorrt_plan"', "model.plan", "KIND_GPU"),
    "onnxruntime": _Server('backend: "onnxruntime"', "model.onnx", "KIND_CPU"),
    "onnxruntime_cuda": _Server('backend: "onnxruntime"', "model.onnx", "KIND_GPU"),
    "openvino": _Server('backend: "openvino"', "model.xml", "KIND_CPU"),
}
_TYPES = {
    "float32": "TYPE_FP32", "float16": "TYPE_FP16", "float64": "TYPE_FP64", "uint8": "TYPE_UINT8", "int8": "TYPE_INT8",
    "int32": "TYPE_INT32", "int64": "TYPE_INT64", "bool": "TYPE_BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What the server decides: engines side by side on a device, and how long a request may wait for others."""

    instances: int = 1
    max_queue_delay_us: int = 100


def package(path: str | Path, repository: Path, *, backend: str | None = None, serving: Serving | None = None) -> Path:
    """Write the bundle's best engine that Triton serves, or that of `backend`, as a model; return its folder.

    An older version of the model is replaced in one rename. A TensorRT engine that the bundle leaves to the device is built
    where the GPU and the builder are here.

    Raises:
        ConfigError: not a bundle, a damaged one, no such engine in it, or the place holds something else.
        Unsupported: Triton has no backend for it, or cannot open such an engine.
    """
    folder = bundle.folder_of(path)
    manifest = bundle.read(folder)
    entry = _entry(folder, manifest, backend)
    name = entry["backend"]
    entry["build_options"] = ((manifest.get("build") or {}).get("backend_options") or {}).get(name, {})
    if name == "tensorrt" and entry["build_options"].get("strip_weights"):
        raise Unsupported(
            f"{folder}: its TensorRT engine holds no weights, and Triton cannot put them back: build it without "
            "strip_weights, or serve another engine with --backend"
        )
    inputs, outputs = _tensors(folder, manifest, name)
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)
    place = repository / model
    if place.exists() and not (place / CONFIG).is_file():
        raise ConfigError(f"{place}: exists and is no model of a Triton repository; choose another folder")
    source = bundle.verified_engine(folder, entry) if "path" in entry else rebuild.built_here(folder, manifest, name)
    labels = bundle.labels(folder)
    text = config(
        model, entry, inputs, outputs, batch_sizes=(manifest.get("build") or {}).get("batch_sizes", [1]),
        serving=serving or Serving(), labelled=bool(labels) and manifest["model"]["task"] == "classification",
    )  # fmt: skip
    repository.mkdir(parents=True, exist_ok=True)
    with store.atomic_folder(place, replace=True) as made:
        (made / "1").mkdir()
        for file in backends.engine_files(source):
            shutil.copyfile(file, made / "1" / Path(_SERVERS[name].file).with_suffix(_suffix(file, source, name)))
        (made / CONFIG).write_text(text, encoding="utf-8")
        if labels:
            (made / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    return place


def config(
    model: str,
    entry: Mapping[str, Any],
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    *,
    batch_sizes: Sequence[int],
    serving: Serving,
    labelled: bool = False,
) -> str:
    """Return `config.pbtxt`. A fixed batch is part of the shape; a dynamic one is Triton's to fill, up to the largest size."""
    server = _SERVERS[entry["backend"]]
    batched = all(info.shape[:1] == (-1,) for info in (*inputs, *outputs))
    largest = max(batch_sizes) if batched else 0
    lines = [
        *_about(entry, batched=batched),
        f"name: {json.dumps(model)}",
        server.line,
        f"max_batch_size: {largest}",
        *_tensor_lines("input", inputs, batched=batched),
        *_tensor_lines("output", outputs, batched=batched, labels="labels.txt" if labelled else ""),
        *_instances(server, entry, serving, batch_sizes),
    ]
    if batched and largest > 1:
        preferred = ", ".join(str(size) for size in sorted(set(batch_sizes)) if size > 1)
        delay = serving.max_queue_delay_us
        lines += [f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] max_queue_delay_microseconds: {delay} }}"]
    if server.device == "KIND_GPU" and entry["backend"] == "tensorrt":
        lines += ["optimization { cuda { graphs: true } }"]
    sizes = sorted(set(batch_sizes)) if batched else [0]
    lines += [line for size in sizes for line in _warm_up(size, inputs, batched=batched)]
    return "\n".join(lines) + "\n"


def _entry(folder: Path, manifest: Mapping[str, Any], wanted: str | None) -> dict[str, Any]:
    built = manifest["engines"]
    left = [
        {"backend": graph["backend"]}
        for graph in manifest.get("graphs") or ()
        if graph["backend"] not in {entry["backend"] for entry in built}
        and not rebuild.why_not(manifest, graph["backend"])
    ]
    entries = [entry for entry in (*left, *built) if wanted in (None, entry["backend"])]
    good = [entry for entry in entries if wanted or (entry.get("verification") or {}).get("passed", True)]
    there = ", ".join(entry["backend"] for entry in built) or "none"
    if not good:
        raise ConfigError(
            f"{folder}: this bundle has no {wanted or 'engine that passed verification'}; its engines: {there}"
        )
    served = [entry for entry in good if entry["backend"] in _SERVERS]
    if not served:
        raise Unsupported(f"Triton serves {', '.join(_SERVERS)}; this bundle's engines are: {there}")
    return dict(served[0])


def _tensors(
    folder: Path, manifest: Mapping[str, Any], backend: str
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    graph: Mapping[str, Any] = next((one for one in manifest.get("graphs") or () if one["backend"] == backend), {})
    if not graph.get("inputs") or not graph.get("outputs"):
        raise ConfigError(
            f"{folder}: its manifest does not say its inputs and outputs; build it with this rdeploy again"
        )
    inputs, outputs = (
        tuple(TensorInfo(name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"])) for t in graph[kind])
        for kind in ("inputs", "outputs")
    )
    for info in (*inputs, *outputs):
        if info.dtype not in _TYPES:
            raise Unsupported(f"{folder}: Triton has no data type for {info.name}, which is {info.dtype}")
    return inputs, outputs


def _suffix(file: Path, source: Path, backend: str) -> str:
    """Return `.bin` for the weights beside an OpenVINO model, else what Triton expects of this backend."""
    return file.suffix if file != source else Path(_SERVERS[backend].file).suffix


def _about(entry: Mapping[str, Any], *, batched: bool) -> Iterable[str]:
    version = entry.get("backend_version") or "built on this machine"
    yield f"# Written by rdeploy from an engine of {entry['backend']} {version}."
    if entry["backend"] == "tensorrt":
        devices = ", ".join(entry.get("built_for") or ()) or "the GPU that it was built on"
        if (entry.get("build_options") or {}).get("lean_runtime"):
            yield f"# It runs on {devices}, in a Triton whose TensorRT has that version or a later one of the same major:"
            yield "# tritonserver --backend-config=tensorrt,version-compatible=true, which lets the engine run code of its own."
        else:
            yield f"# It runs on {devices}, in a Triton whose TensorRT has that very version."
    if not batched:
        yield "# Its batch size is fixed: build with --batch 1 --batch 8 to let Triton put requests together."


def _tensor_lines(kind: str, infos: Sequence[TensorInfo], *, batched: bool, labels: str = "") -> Iterable[str]:
    for index, info in enumerate(infos):
        shape = info.shape[1:] if batched else info.shape
        dims = ", ".join(str(size) for size in shape)
        label = f" label_filename: {json.dumps(labels)}" if labels and not index else ""
        yield f"{kind} [ {{ name: {json.dumps(info.name)} data_type: {_TYPES[info.dtype]} dims: [ {dims} ]{label} }} ]"


def _instances(
    server: _Server, entry: Mapping[str, Any], serving: Serving, batch_sizes: Sequence[int]
) -> Iterable[str]:
    profiles = _profiles(entry, batch_sizes)
    chosen = f" profile: [ {', '.join(json.dumps(str(i)) for i in range(profiles))} ]" if profiles > 1 else ""
    core = (entry.get("build_options") or {}).get("dla_core")
    dla = f" secondary_devices: [ {{ kind: KIND_NVDLA device_id: {core} }} ]" if core is not None else ""
    yield f"instance_group [ {{ count: {serving.instances} kind: {server.device}{chosen}{dla} }} ]"


def _profiles(entry: Mapping[str, Any], batch_sizes: Sequence[int]) -> int:
    """Return how many optimization profiles a TensorRT engine has; Triton has to be told to use more than the first."""
    options = entry.get("build_options") or {}
    if given := options.get("batch_ranges"):
        return len(given)
    return len(set(batch_sizes)) if options.get("profile_per_batch") else 1


def _warm_up(size: int, inputs: Sequence[TensorInfo], *, batched: bool) -> Iterable[str]:
    yield "model_warmup [ {"
    yield f'  name: "batch {size}" batch_size: {size}' if batched else '  name: "the engine\'s batch" batch_size: 0'
    for info in inputs:
        dims = ", ".join(str(n) for n in (info.shape[1:] if batched else info.shape))
        value = f"{{ data_type: {_TYPES[info.dtype]} dims: [ {dims} ] random_data: true }}"
        yield f"  inputs {{ key: {json.dumps(info.name)} value: {value} }}"
    yield "} ]"
