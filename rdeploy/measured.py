"""What is found out about one engine by running it: raw samples with the facts that make them mean something.

Everything is raw or comes with the method that found it; percentiles and the like are derived (`measure.summary`).
A fact that could not be had is None, and the text beside it says why. Units are suffixes: `_ms`, `_s`, `_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WALL_CLOCK = "wall clock around one synchronous call, input and output in host memory"
"""The definition of latency that everything is compared by, unless a measurement says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes, each with the method that found it in `method` (name -> how). None where it cannot be known.

    `context` is the runtime itself (its libraries and, on a GPU, the CUDA context) before any engine is opened;
    `private` is what only this process holds after the runs; the `device_` ones are GPU memory;
    `build_peak` is the process that built the engine; `limit` is what the control group allows.
    """

    weights: int | None
    activations: int | None
    workspace: int | None
    process_peak: int | None
    context: int | None = None
    private: int | None = None
    device_context: int | None = None
    device_peak: int | None = None
    build_peak: int | None = None
    limit: int | None = None
    method: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules of one run, by the meter that `method` names; None, and the reason in `method`, where there is no meter.

    `idle_watts` is what the same meter read while nothing ran; it is part of `joules_per_run`, not taken off.
    """

    joules_per_run: float | None
    watts: float | None = None
    idle_watts: float | None = None
    domains: tuple[tuple[str, float], ...] = ()
    """Joules of one run by what the meter tells apart: (("package-0", 0.21), ("dram", 0.03))."""
    runs: int = 0
    method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What `streams` sessions side by side got done, each calling back to back on `threads` threads of the runtime."""

    streams: int
    threads: int | None
    seconds: float
    runs: int
    images_per_s: float
    p50_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """Requests at a camera's pace, alternating with requests back to back in the same process; raw milliseconds.

    `idle_cost` is paced over back-to-back latency with its 95 % interval. `late` counts the frames whose answer came
    after the next frame.
    """

    fps: float
    paced_ms: tuple[float, ...]
    back_to_back_ms: tuple[float, ...]
    idle_cost: float
    idle_cost_ci95: tuple[float, float]
    verdict: str
    late: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """One kernel as the runtime's own profiler times it: mean milliseconds of one run.

    `layers` are the model's own layers that it covers (several where the runtime fused them), empty where it is the
    runtime's addition, such as a change of layout.
    """

    name: str
    kind: str
    mean_ms: float
    layers: tuple[str, ...] = ()
    precision: str = ""
    kernel: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """All kernels of one run, in order of execution; with `remainder_ms` they sum to `whole_ms`.

    `whole_ms` is the wall clock of the same runs, the profiler being on: compare it with the latency that was measured
    without one to see what profiling itself costs.
    """

    profiler: str
    runs: int
    whole_ms: float
    remainder_ms: float
    kernels: tuple[LayerTime, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEnd:
    """From the file to the answer, image by image: raw milliseconds of each stage, in the same order.

    `upload_ms` and `download_ms` are part of `inference_ms`, where the runtime tells them apart.
    """

    images: int
    decode_ms: tuple[float, ...]
    preprocess_ms: tuple[float, ...]
    inference_ms: tuple[float, ...]
    upload_ms: tuple[float, ...] = ()
    download_ms: tuple[float, ...] = ()
    definition: str = (
        "wall clock from an image file in the page cache to the output in host memory, one image at a time"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run of MLPerf's load generator; its own logs lie in `folder`."""

    scenario: str
    valid: bool
    metric: str
    value: float
    summary: tuple[tuple[str, str], ...] = ()
    folder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Raw wall-clock latencies of one engine at one batch size; everything else is derived from them.

    `unfit` holds the reasons why this machine, while it measured, was not fit for it; empty means fit. `machine` is the
    state it was in. The fields after `machine` are there where they were asked for.
    """

    batch: int
    threads: int | None
    latencies_ms: tuple[float, ...]
    warmup: int
    stable: bool
    memory: Memory
    load: float | None = None
    clock_mhz: float | None = None
    definition: str = WALL_CLOCK
    device_latencies_ms: tuple[float, ...] = ()
    device_clock: str = ""
    """How the device's own clock was read, or why there is none."""
    unfit: tuple[str, ...] = ()
    machine: tuple[tuple[str, Any], ...] = ()
    energy: Energy | None = None
    throughput: tuple[Throughput, ...] = ()
    paced: Paced | None = None
    layers: LayerTimes | None = None
    end_to_end: EndToEnd | None = None
    scenarios: tuple[Scenario, ...] = ()
    notes: tuple[str, ...] = ()
    """What was asked for and could not be had, with the reason."""
