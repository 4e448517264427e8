"""What every backend does around its vendor's calls: time a build, hash and weigh what it wrote, check what is fed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import environment, serde
from rdeploy.errors import ConfigError, InvariantError, MissingDependency, RdeployError, Unsupported
from rdeploy.types import Engine, Options, TensorInfo


def engine_files(path: Path) -> tuple[Path, ...]:
    """Return every file of an engine: the one that is opened, and an OpenVINO IR's weights beside it."""
    return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)


def engine_sha256(path: Path) -> str:
    """Return the sha256 of an engine: of its file, or of its files' sha256 in order where there are several.

    Raises:
        ConfigError: a file is missing.
    """
    try:
        digests = [serde.file_sha256(file) for file in engine_files(path)]
    except OSError as error:
        raise ConfigError(f"cannot read the engine {path}: {error.strerror} ({error.filename})") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


class BuildRecord:
    """Times a build from its construction on; `engine` turns what was written into the record of it."""

    def __init__(self, onnx: Path, directory: Path) -> None:
        if not onnx.is_file():
            raise ConfigError(f"no ONNX file at {onnx}")
        directory.mkdir(parents=True, exist_ok=True)
        self._source = serde.file_sha256(onnx)
        self._started = time.perf_counter()

    def engine(self, path: Path, *, backend: str, version: str, fingerprint: Options = (), **facts: Any) -> Engine:
        """Return the engine at `path`, which is relative to its folder in the result; `facts` are further fields.

        `fingerprint` adds to what every engine depends on (`environment.engine_facts`).
        """
        return Engine(
            path=path.name,
            sha256=engine_sha256(path),
            size_bytes=sum(file.stat().st_size for file in engine_files(path)),
            backend=backend,
            backend_version=version,
            source_sha256=self._source,
            build_s=time.perf_counter() - self._started,
            build_peak_bytes=peak_rss_bytes(),
            fingerprint=(*environment.engine_facts(), *fingerprint),
            **facts,
        )


class Misfit(str):
    """Why an engine does not fit this machine: built again here it would, whereas installing something would not help."""

    __slots__ = ()


def peak_rss_bytes() -> int | None:
    """Return the highest resident memory of this process so far (a build runs in a process of its own)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def missing(module: str, what: str, install: str) -> str | None:
    """Return the sentence that `load` would raise when `module` is not installed, or None. Imports nothing."""
    if importlib.util.find_spec(module) is not None:
        return None
    return str(MissingDependency(f"{what} is not installed here", install=install))


def load(module: str, what: str, install: str) -> Any:
    """Import a vendor's package.

    Raises:
        MissingDependency: it is not installed, or a library that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise MissingDependency(f"{what} does not load: {error}", install=install) from error
        raise MissingDependency(f"{what} is not installed here", install=install) from error
    except (ImportError, OSError) as error:
        raise MissingDependency(f"{what} does not load: {first_line(error)}", install=install) from error


@contextlib.contextmanager
def explained(action: str, kinds: tuple[type[BaseException], ...], error_type: type[RdeployError]) -> Iterator[None]:
    """Turn a vendor's exceptions into one sentence that begins with `action`."""
    try:
        yield
    except kinds as error:
        raise error_type(f"{action}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return what an exception says in one line; OpenVINO's source positions and failed checks are left out for the cause."""
    lines = [_CHECK.sub("", line.strip()).strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(_NO_CAUSE)]
    if not told:
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    said, *more = told
    cause = next((line for line in more if not line.startswith("While validating")), "")
    return f"{said} {cause}" if said.endswith(":") and cause else said


_CHECK = re.compile(r"Check '.*' failed at \S+:\d+:")
_NO_CAUSE = ("Exception from ", "FrontEnd API failed", "Model wasn't fully converted", "-- ")


def check_inputs(expected: Sequence[TensorInfo], given: Mapping[str, NDArray[Any]]) -> None:
    """Check names, dtypes and shapes of what is fed.

    Raises:
        InvariantError: the session is not open.
        ConfigError: a name is missing or unknown, or an array does not fit; the message says what the engine takes.
    """
    if not expected:
        raise InvariantError("the session is not open: use it in a `with` block")
    for info in expected:
        if info.name not in given:
            raise ConfigError(f"input {info.name!r} is missing; the engine takes {describe(expected)}")
        array = given[info.name]
        if array.dtype != np.dtype(info.dtype):
            raise ConfigError(f"input {info.name!r} is {array.dtype}, the engine takes {describe([info])}")
        fits = [want in (-1, have) for want, have in zip(info.shape, array.shape, strict=False)]
        if array.ndim != len(info.shape) or not all(fits):
            raise ConfigError(f"input {info.name!r} is {list(array.shape)}, the engine takes {describe([info])}")
    if len(given) > len(expected):
        extra = sorted(set(given) - {info.name for info in expected})
        raise ConfigError(f"unknown input {extra[0]!r}; the engine takes {describe(expected)}")


def describe(infos: Sequence[TensorInfo]) -> str:
    """Return `x: float32 [?, 3, 224, 224]`, one after the other."""
    shapes = ["[" + ", ".join("?" if n < 0 else str(n) for n in info.shape) + "]" for info in infos]
    return "; ".join(f"{info.name}: {info.dtype} {shape}" for info, shape in zip(infos, shapes, strict=True))


def zeros(infos: Sequence[TensorInfo], *, batch: int) -> dict[str, NDArray[Any]]:
    """Return all-zero inputs with `batch` in the place of a dynamic batch."""
    check_only_batch_is_dynamic(infos)
    return {i.name: np.zeros([batch if n < 0 else n for n in i.shape], i.dtype) for i in infos}


def check_only_batch_is_dynamic(infos: Sequence[TensorInfo]) -> None:
    """Check that no dimension but the first is dynamic.

    Raises:
        Unsupported: one is; an engine is built for one resolution.
    """
    for info in infos:
        if -1 in info.shape[1:]:
            raise Unsupported(
                f"input {describe([info])}: only the first dimension may be dynamic; export the model at one resolution"
            )
