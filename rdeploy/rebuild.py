"""An engine that does not fit this machine is built again, from the bundle's portable graph, where its builder is here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdeploy import backends, bundle, hardware, plugins, serde
from rdeploy.backends import _cuda
from rdeploy.errors import ConfigError, RdeployError
from rdeploy.store import Store, default_root
from rdeploy.types import Engine, Target

BUILDERS = ("tensorrt", "tensorrt_rtx")
"""Runtimes whose engines are tied to a GPU and a version; those of CPUs run as they are."""


def why_not(manifest: Mapping[str, Any], backend: str) -> str | None:
    """Return why this backend's engine cannot be built and opened here, or None when it can; builds nothing."""
    if backend not in BUILDERS:
        return f"{backend} engines are not built again"
    if backend not in {graph["backend"] for graph in manifest.get("graphs") or ()}:
        return "the bundle does not hold its portable graph"
    if not hardware.gpus():
        return "there is no NVIDIA GPU here"
    reason: str | None = backends.find(backend).unavailable()
    return reason or _cuda.missing()  # without it nothing that is built here can be opened


def built_here(folder: Path, manifest: Mapping[str, Any], backend: str) -> Path:
    """Return an engine for this machine; the first call builds it, with the kernel times known here, later ones find it.

    Raises:
        ConfigError: the graph was changed after the bundle was written, or the bundle's options are not this version's.
        RdeployError: the builder refuses.
    """
    from rdeploy import preflight  # reads YAML, which opening an engine does not need

    plugin = backends.find(backend)
    graph = bundle.verified_graph(folder, manifest, backend)
    target = _target(manifest)
    options = plugins.make_options(plugin.Options, dict(target.options_of(backend)), where=f"{folder}: {backend}")
    preflight.check(graph, backend, target)
    gpu = hardware.gpus()[0]

    def write(place: Path) -> None:
        engine = plugin.build_engine(graph, place, target=target, options=options)
        (place / "engine.json").write_text(serde.dumps(engine))

    facts = [serde.file_sha256(graph), backend, plugin.version(), gpu.name, gpu.compute_capability, options, target]
    place = Store(default_root()).make("rebuilt", serde.digest(facts), write)
    engine = serde.from_json(Engine, json.loads((place / "engine.json").read_text()), where=str(place))
    if backends.engine_sha256(place / engine.path) != engine.sha256:
        raise ConfigError(f"{place}: the engine that was built here was changed since; delete that folder")
    if (reason := plugin.cannot_run(engine)) is not None:
        raise RdeployError(reason)
    return place / engine.path


def _target(manifest: Mapping[str, Any]) -> Target:
    """Return the target that the bundle was built for, for the GPU that is here."""
    build = manifest.get("build") or {}
    options = build.get("backend_options") or {}
    return Target(
        name=manifest.get("target") or "bundle",
        batch_sizes=tuple(build.get("batch_sizes") or (1,)),
        backend_options=tuple(
            (name, tuple((k, _frozen(v)) for k, v in given.items())) for name, given in options.items()
        ),
    )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
