"""What the job files hold: frozen dataclasses that `serde` reads strictly; plain data, paths and numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdeploy.measured import Measurement
from rdeploy.results import Failure
from rdeploy.types import VOID, Limits, Preprocessing, Size, Target, Timing

_PATHS = ("onnx", "directory", "outputs", "pixels", "reference", "native", "path", "logs")
_LISTS_OF_PATHS = ("masks", "boxes", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """Images as the network's input size wants them: a .npy file of uint8 (N, H, W, C), and how to normalise them."""

    pixels: str
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What to run an engine on, and what to compare its outputs with; all arrays are .npy files with N rows.

    `reference`: the FP32 variant's outputs; None makes this run the reference. `native`: the native model's outputs.
    Both name the first output's file (see `metrics.outputs`). `masks`: a file an image with the class of each pixel;
    those whose value is in `void` do not count. `batch` is for engines with a dynamic batch; a static one runs at its own.
    """

    pixels: str
    preprocessing: Preprocessing
    reference: str | None = None
    native: str | None = None
    labels: tuple[int, ...] | None = None
    task: str = "classification"
    masks: tuple[str, ...] | None = None
    void: tuple[int, ...] = (VOID,)
    boxes: tuple[str, ...] | None = None
    """A YOLO label file an image."""
    frame: Size | None = None
    """The native size (h, w), in whose pixels a detector's boxes are."""
    batch: int = 16
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """Build `onnx` into `directory` for `target`, then verify; `outputs` is where to keep the outputs (.npy)."""

    backend: str
    onnx: str
    directory: str
    target: Target
    verify: VerifyRequest | None = None
    outputs: str | None = None
    job: str = "engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyJob:
    """Verify the engine file at `path`."""

    backend: str
    path: str
    verify: VerifyRequest
    threads: int | None = None
    outputs: str | None = None
    job: str = "verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One engine to measure; the bytes are analytic and only passed through to its memory account."""

    name: str
    backend: str
    path: str
    batch: int = 1
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    build_peak_bytes: int | None = None
    input: Pixels | None = None
    """This entry's own images (the native baseline's differ in size); None takes the job's."""
    preprocessing: Preprocessing | None = None
    """What image files go through on their way into this engine."""
    onnx: str | None = None
    """The graph that it was built from, for the names of its layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to measure beyond latency, one engine at a time, after all latencies are there.

    `streams`: so many sessions side by side; `fps`: a camera's pace; `images`: files to go end to end with;
    `scenarios`: MLPerf's, whose logs go below the folder `logs`.
    """

    energy: bool = False
    streams: tuple[int, ...] = ()
    fps: float | None = None
    layers: bool = False
    images: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    logs: str = ""
    seconds: float = 2.0
    """How long each of them takes; MLPerf's scenarios take five times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureJob:
    """Measure `entries` interleaved; `input` None feeds seeded random numbers. `timeout_s` is for one answer."""

    entries: tuple[Entry, ...]
    timing: Timing = field(default_factory=Timing)
    threads: int | None = None
    seed: int = 0
    input: Pixels | None = None
    asked: Asked = field(default_factory=Asked)
    timeout_s: float = 120.0
    job: str = "measure"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionJob:
    """One entry of a measure job, as its own child process gets it."""

    entry: Entry
    timing: Timing
    threads: int | None = None
    seed: int = 0
    job: str = "session"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One entry's outcome: a measurement, or the failure that ended it.

    `blocks`: latencies (ms) by round; block i of all entries was measured in the same round (see `measure.speedup`).
    `details`: bytes before and after opening, both peaks, opening time, runs a block; units are in the names.
    """

    name: str
    measurement: Measurement | None = None
    blocks: tuple[tuple[float, ...], ...] = ()
    details: tuple[tuple[str, float | None], ...] = ()
    failure: Failure | None = None


def with_absolute_paths(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job with every path in it made absolute."""
    return {key: _absolute(key, value) for key, value in job.items()}


def _absolute(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return with_absolute_paths(value)
    if isinstance(value, (list, tuple)):
        key = "path" if key in _LISTS_OF_PATHS else ""
        return [_absolute(key, item) for item in value]
    return str(Path(value).absolute()) if key in _PATHS and isinstance(value, (str, Path)) else value
