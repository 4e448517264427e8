"""Before anything is built: an ONNX file and a target go in, every reason why it cannot be built there comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rdeploy import backends, capabilities, hardware, targets
from rdeploy.errors import MissingDependency, StageError
from rdeploy.types import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one release line of a runtime makes of a graph, for one target; without obstacles it can be built."""

    title: str
    target: str
    obstacles: tuple[str, ...]


def obstacles(onnx: Path, backend: str, target: Target) -> tuple[str, ...]:
    """Return what keeps this backend from building this graph for the target; empty for the runtimes of CPUs.

    The version is the one that is installed here; else the one that the target's system brings; else the newest known.
    """
    if backend not in capabilities.RUNTIMES:
        return ()
    from rdeploy.graph import needs

    capability = capabilities.find(backend, version(backend, target))
    return capabilities.obstacles(needs.read(onnx), capability, _with_memory(target))


def check(onnx: Path, backend: str, target: Target) -> None:
    """Refuse to build what cannot be built. On a device without onnx nobody can read the graph, and the builder has to say it.

    Raises:
        StageError: something is in the way; the message holds all of it.
    """
    told: tuple[str, ...] = ()
    with contextlib.suppress(ImportError):
        told = obstacles(onnx, backend, target)
    if told:
        raise StageError("preflight", "; ".join(told))


def _with_memory(target: Target) -> Target:
    """Return the target with the memory of the GPU that is here, where it is of the target's kind and has more than the profile
    says: that is what the smallest of its kind has."""
    wanted = target.compute_capabilities
    here = [gpu for gpu in hardware.gpus()[:1] if not wanted or gpu.compute_capability in wanted]
    if not here:
        return target
    return replace(target, memory_mb=max(target.memory_mb or 0, here[0].memory_bytes >> 20))


def to_be_lowered(onnx: Path, backend: str, target: Target) -> tuple[str, ...]:
    """Return the operators of a graph that this backend lacks and that can be written with others."""
    if backend not in capabilities.RUNTIMES:
        return ()
    lacks = capabilities.find(backend, version(backend, target)).lacks
    from rdeploy.graph import lower, needs

    candidates = lower.lowerable(lacks)
    return tuple(name for name, _ in needs.read(onnx).operators if name in candidates) if candidates else ()


def version(backend: str, target: Target) -> str:
    """Return the version of a runtime that the target will be built with, as far as that is known here."""
    try:
        return str(backends.find(backend).version())
    except MissingDependency:
        newest = [entry.version for entry in capabilities.table() if entry.runtime == backend][-1]
        return target.tensorrt or newest


def verdicts(onnx: Path, target_names: Sequence[str], graphs: Mapping[str, Path] | None = None) -> tuple[Verdict, ...]:
    """Return what the TensorRT of each target makes of a graph; without targets, what every release line does.

    Args:
        graphs: backend -> its own graph, where a bundle has one that differs from `onnx`.
    """
    from rdeploy.graph import needs

    needed = {name: needs.read((graphs or {}).get(name, onnx)) for name in capabilities.RUNTIMES}
    if not target_names:
        anything = Target(name="any device")
        found = [(entry, anything) for entry in capabilities.table()]
    else:
        found = [pair for name in target_names for pair in _entries(targets.load(name))]
    return tuple(
        Verdict(
            title=entry.title,
            target=target.name if target_names else "",
            obstacles=capabilities.obstacles(needed[entry.runtime], entry, target),
        )
        for entry, target in found
    )


def _entries(target: Target) -> list[tuple[capabilities.Capability, Target]]:
    """Return the TensorRTs of a target: what its system brings, not what happens to be installed here."""
    found = []
    for backend in target.backends:
        if backend in capabilities.RUNTIMES:
            wanted = target.tensorrt if backend == "tensorrt" and target.tensorrt else version(backend, target)
            found.append((capabilities.find(backend, wanted), target))
    return found
