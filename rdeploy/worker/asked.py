"""What an engine is asked beyond its latency, each by name: energy, throughput, a camera's pace, layers, images, MLPerf.

An engine that is open and warm goes in, one of the dataclasses of `measured` (or, for a pace, raw blocks) comes out.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from rdeploy import energy as meters
from rdeploy import machine, measure
from rdeploy.backends import _layers
from rdeploy.errors import Unsupported
from rdeploy.measured import EndToEnd, Energy, LayerTimes, Scenario, Throughput
from rdeploy.worker.jobs import SessionJob

_BACK_TO_BACK_S = 0.25
_MIN_FRAMES = 5
_LEAD_S = 0.2
_LAYER_RUNS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """An open, warm engine: `run` is one call of `session` on `inputs`."""

    backend: Any
    job: SessionJob
    session: Any
    inputs: dict[str, NDArray[Any]]
    run: Callable[[], object]


def energy(ready: Ready, *, seconds: float) -> Energy:
    """Return the joules of a run, or why nobody can tell."""
    sources, why = meters.find(gpu=machine.gpu())
    if not sources:
        return Energy(joules_per_run=None, method=why)
    return meters.per_run(ready.run, sources, seconds=seconds)


def pace(ready: Ready, *, fps: float, rounds: int, seconds: float) -> dict[str, Any]:
    """Return `rounds` blocks of paced latencies and as many back to back, by turns, and how many frames were late."""
    frames = max(_MIN_FRAMES, round(seconds * fps))
    paced, back_to_back, late = [], [], 0
    for _ in range(rounds):
        latencies, missed = measure.paced_runs(ready.run, frames, fps=fps)
        paced.append(latencies)
        late += missed
        ready.run()
        count = max(_MIN_FRAMES, round(_BACK_TO_BACK_S * 1000 / max(median(latencies), 1e-3)))
        back_to_back.append(measure.timed_runs(ready.run, min(count, frames)))
    return {"paced": paced, "back_to_back": back_to_back, "late": late}


def streams(ready: Ready, *, count: int, threads: int | None, seconds: float) -> Throughput:
    """Return what `count` sessions side by side get done in `seconds`, after a moment to get going."""
    with contextlib.ExitStack() as stack:
        path, backend = Path(ready.job.entry.path), ready.backend
        sessions = [stack.enter_context(backend.open_session(path, threads=threads)) for _ in range(count)]
        for session in sessions:
            session.run(ready.inputs)
        ends = _side_by_side([functools.partial(s.run, ready.inputs) for s in sessions], seconds=seconds)
    runs = sum(len(latencies) for latencies in ends)
    return Throughput(
        streams=count,
        threads=threads,
        seconds=seconds,
        runs=runs,
        images_per_s=ready.job.entry.batch * runs / seconds,
        p50_ms=median([latency for latencies in ends for latency in latencies] or [0.0]),
    )


def _side_by_side(runs: list[Callable[[], object]], *, seconds: float) -> list[list[float]]:
    """Call each in a thread of its own; return the latencies (ms) of the calls that ended in the window, by thread."""
    gate = threading.Barrier(len(runs))
    found: list[list[float]] = [[] for _ in runs]
    failures: list[BaseException] = []

    def stream(index: int) -> None:
        gate.wait()
        opened = time.perf_counter() + _LEAD_S
        end = 0.0
        try:
            while end < opened + seconds:
                start = time.perf_counter()
                runs[index]()
                end = time.perf_counter()
                if opened <= end < opened + seconds:
                    found[index].append((end - start) * 1000.0)
        except Exception as error:  # noqa: BLE001 - a thread's failure is raised again where it was started
            failures.append(error)

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found


def layers(ready: Ready) -> LayerTimes:
    """Return the kernels' times by the runtime's own profiler.

    Raises:
        Unsupported: the backend has no profiler.
    """
    profile = getattr(ready.backend, "layer_times", None)
    if profile is None:
        raise Unsupported(f"{ready.job.entry.backend} has no profiler of its own: no times by layer")
    entry = ready.job.entry
    found: LayerTimes = profile(Path(entry.path), ready.inputs, threads=ready.job.threads, runs=_LAYER_RUNS)
    return found if entry.onnx is None else _layers.named(found, _layers.read_names(Path(entry.onnx)))


def end_to_end(ready: Ready, *, images: list[str], seconds: float) -> EndToEnd:
    """Return the time of every stage from image files to the answer."""
    from rdeploy.worker.files import from_files

    return from_files(ready.session, ready.job.entry, images=images, seconds=seconds)


def scenario(ready: Ready, *, name: str, folder: str, seconds: float, rate: float) -> Scenario:
    """Return the result of one scenario of MLPerf's load generator."""
    from rdeploy.worker.mlperf import run_scenario

    return run_scenario(ready.run, name, folder=Path(folder), seconds=seconds, rate=rate, batch=ready.job.entry.batch)


MEASURES: dict[str, Callable[..., Any]] = {
    "energy": energy,
    "pace": pace,
    "streams": streams,
    "layers": layers,
    "end_to_end": end_to_end,
    "scenario": scenario,
}
