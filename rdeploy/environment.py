"""The machine and the software that a number was measured with: facts for the manifest, and a stable fingerprint."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

from rdeploy import __version__, hardware, serde
from rdeploy.machine import settings

RUNTIMES = (
    "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt-rtx-cu13-libs", "cuda-python", "cuda-bindings", "onnx", "onnxscript", "torch", "torchvision", "timm",
    "numpy",
)  # fmt: skip
"""Distributions whose versions change a result."""


def describe() -> tuple[tuple[str, Any], ...]:
    """Return the machine and the software as JSON-able (name, value) pairs; a fact that is not there is None.

    No runtime is imported: versions come from the installed packages' metadata.
    """
    return (
        *stable(),
        *settings().items(),
        ("memory_bytes", hardware.memory_bytes()),
        ("memory_limit_bytes", hardware.memory_limit_bytes()),
        ("load", _load()),
    )


def fingerprint() -> str:
    """Return a short hash of what decides speed and numerics here; the same tomorrow, whatever the load."""
    return serde.digest(dict(stable()))[:16]


def measuring_resource() -> str:
    """Return the name of the Ray resource, one of it a node, that a machine like this one is started with."""
    return f"rdeploy-measure-{fingerprint()}"


def machine() -> str:
    """Return the operating system and the architecture, such as `Linux aarch64`: engines do not travel between them."""
    return f"{platform.system()} {platform.machine()}"


def engine_facts() -> tuple[tuple[str, Any], ...]:
    """Return what an engine that is built here depends on besides its own runtime; JSON-able pairs."""
    present = hardware.cpu_flags()
    return (
        ("machine", machine()),
        ("cpu_flags", tuple(flag for flag in hardware.FLAGS_THAT_MATTER if flag in present)),
        ("compute_capability", next((gpu.compute_capability for gpu in hardware.gpus()), None)),
        ("driver", hardware.driver_version()),
    )


def runtimes() -> tuple[tuple[str, str], ...]:
    """Return the installed distributions among `RUNTIMES` with their versions."""
    found: list[tuple[str, str]] = []
    for name in RUNTIMES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((name, importlib.metadata.version(name)))
    return tuple(found)


def stable() -> tuple[tuple[str, Any], ...]:
    """Return the facts of which `fingerprint` is made."""
    present = hardware.cpu_flags()
    return (
        ("cpu", hardware.cpu_model()),
        ("cpu_flags", tuple(flag for flag in hardware.FLAGS_THAT_MATTER if flag in present)),
        ("threads", hardware.cores()),
        ("cpu_quota", hardware.cpu_quota()),
        ("gpu", tuple(f"{gpu.name} ({gpu.compute_capability})" for gpu in hardware.gpus())),
        ("driver", hardware.driver_version()),
        ("board", hardware.jetson_model()),
        ("runtimes", dict(runtimes())),
        ("rdeploy", __version__),
        ("python", platform.python_version()),
        ("os", f"{platform.system()} {platform.release()} {platform.machine()}"),
    )


def _load() -> float | None:
    """Return the load average of the last minute."""
    with contextlib.suppress(OSError):
        return round(os.getloadavg()[0], 2)
    return None
