"""How an engine is opened: a small file beside it says what its bytes do not; it goes in, a runtime that fits comes out.

A version-compatible engine without a lean runtime inside is opened, in another version, by the lean runtime library of the
version that built it: `Runtime.load_runtime`, "Version Compatibility" in NVIDIA's documentation.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import serde, store

TRUST = "RDEPLOY_TRUST_ENGINE_CODE"
"""Set to 1, engines of others may bring host code (a lean runtime) that runs when they are opened."""
_SUFFIX = ".opening"
_WHEELS = ("tensorrt-lean-cu13-libs", "tensorrt-lean-cu12-libs", "tensorrt-lean-cu11-libs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a runtime has to be told before it opens an engine.

    dla_core: the DLA core that it runs on; a runtime takes core 0 unless it is told.
    lean_version: the version whose lean runtime opens it in other versions; empty where it is for one version, or brings it.
    host_code: it brings the lean runtime, which is code.
    shares_profiles: contexts may share its optimization profiles, which before TensorRT 10 is decided when it is built.
    """

    dla_core: int | None = None
    lean_version: str = ""
    host_code: bool = False
    shares_profiles: bool = False


def keep(path: Path, opening: Opening) -> None:
    """Write `ENGINE.opening` beside an engine that was just built, and remember that its code is of this machine."""
    if opening != Opening():
        path.with_name(path.name + _SUFFIX).write_text(serde.dumps(opening))
    if opening.host_code:
        with contextlib.suppress(OSError):  # without the note it is opened with the consent that others' engines need
            note = _note(path.read_bytes())
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def of(path: Path) -> Opening:
    """Return how an engine is opened; one that has no such file needs nothing.

    Raises:
        ConfigError: the file is not one of this version's.
    """
    sidecar = path.with_name(path.name + _SUFFIX)
    if not sidecar.is_file():
        return Opening()
    return serde.from_json(Opening, serde.loads(sidecar.read_text()), where=str(sidecar))


def is_trusted(opening: Opening, content: bytes) -> bool:
    """Whether an engine may run code of its own: it was built here, by this user, or the user says so of all."""
    return os.environ.get(TRUST) == "1" or (opening.host_code and _note(content).is_file())


def _note(content: bytes) -> Path:
    return store.default_root() / "built-here" / hashlib.sha256(content).hexdigest()


def runtimes(trt: Any, logger: Any, opening: Opening, *, trusted: bool) -> tuple[Any, ...]:
    """Return the runtimes to keep while such an engine is open; the last one opens it, and is None where it does not load."""
    made: tuple[Any, ...] = (trt.Runtime(logger),)
    if opening.lean_version not in ("", str(trt.__version__)):
        library = lean_library(opening.lean_version)
        made += (None if library is None else made[0].load_runtime(str(library)),)
    if made[-1] is not None and opening.dla_core is not None:
        made[-1].DLA_core = opening.dla_core
    if made[-1] is not None and trusted:
        made[-1].engine_host_code_allowed = True
    return made


def lean_library(version: str) -> Path | None:
    """Return the lean runtime library of that very version, or None.

    NVIDIA's packages put it beside TensorRT's own library, with the version in its name; the wheels into a package of theirs.
    """
    if not re.fullmatch(r"[\d.]+", version):  # a bundle of others says it, and it becomes part of a path
        return None
    release = _release(version)
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    folders += [Path(f"/usr/lib/{platform.machine()}-linux-gnu"), Path("/usr/lib64"), Path("/usr/local/lib")]
    named = (folder / f"libnvinfer_lean.so.{release}" for folder in folders)
    return next((file for file in named if file.is_file()), None) or _lean_wheel(release)


def _lean_wheel(release: str) -> Path | None:
    for name in _WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wheel = importlib.metadata.distribution(name)
            file = Path(str(wheel.locate_file(f"tensorrt_lean_libs/libnvinfer_lean.so.{release.partition('.')[0]}")))
            if _release(wheel.version) == release and file.is_file():
                return file
    return None


def _release(version: str) -> str:
    """Return `10.16.1` of `10.16.1.11`: the last number is a build's."""
    return ".".join(version.split(".")[:3])
