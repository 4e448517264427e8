"""Engines go in, launches come out: fresh processes of both sides, timed in interleaved rounds, as often as it takes."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rdeploy import backends, serde, targets, worker
from rdeploy.errors import RdeployError
from rdeploy.snapshot import Launch
from rdeploy.types import Engine, Timing
from rdeploy.worker.interleave import measure_interleaved
from rdeploy.worker.jobs import EngineJob, Entry, Measured, MeasureJob

TIMING = Timing(min_samples=128, max_samples=400, min_time_s=0.25, max_time_s=1.0, max_warmup_s=0.5)
"""One launch is short: what limits the interval is how the launches differ, not the runs inside one."""

_BUILD_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An engine's file, and for `build` the graph that it was made of and the target."""

    backend: str
    path: Path
    batch: int = 1
    onnx: Path | None = None
    target: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The launches of every side, the i-th of all sides in the same rounds; `failures` names the sides that broke."""

    launches: Mapping[str, tuple[Launch, ...]]
    definition: str = ""
    load: float | None = None
    failures: Mapping[str, str]

    def __add__(self, later: Outcome) -> Outcome:
        joined = {side: (*before, *later.launches.get(side, ())) for side, before in self.launches.items()}
        return Outcome(
            launches=joined,
            definition=self.definition or later.definition,
            load=later.load if self.load is None else self.load,  # the later ones hold our own work
            failures={**self.failures, **later.failures},
        )


def measure(
    sides: Mapping[str, Place],
    count: int,
    *,
    threads: int | None = None,
    seed: int = 0,
    build: bool = False,
    progress: Callable[[str], None] | None = None,
    timing: Timing = TIMING,
) -> Outcome:
    """Measure `count` launches of all sides; stops at the first launch in which a side fails.

    Every launch starts new processes: what distinguishes two processes with the same engine is drawn anew each time.
    With `build` each launch also builds the sides' engines from their graphs, and times that.
    """
    outcome = Outcome(launches=dict.fromkeys(sides, ()), failures={})
    for index in range(count):
        if progress is not None:
            progress(f"launch {index + 1} of {count}")
        with tempfile.TemporaryDirectory(prefix="rdeploy-launch-") as folder:
            outcome = outcome + _launch(
                sides, Path(folder), threads=threads, seed=seed + index, build=build, timing=timing
            )
        if outcome.failures:
            break
    return outcome


def _launch(
    sides: Mapping[str, Place], folder: Path, *, threads: int | None, seed: int, build: bool, timing: Timing
) -> Outcome:
    entries = tuple(
        Entry(name=name, backend=side.backend, path=str(side.path.absolute()), batch=side.batch)
        for name, side in sides.items()
    )
    job = MeasureJob(entries=entries, timing=timing, threads=threads, seed=seed)
    with contextlib.redirect_stderr(io.StringIO()):  # the stage marks are for a worker's log
        found = {one.name: one for one in measure_interleaved(job, directory=folder)}
    failures = {name: one.failure.message for name, one in found.items() if one.failure is not None}
    if failures:
        return Outcome(launches={}, failures=failures)
    first = next(iter(found.values())).measurement
    try:
        built = {name: _build_s(side, folder / f"build-{name}") if build else None for name, side in sides.items()}
    except RdeployError as error:
        return Outcome(launches={}, failures={next(iter(sides)): str(error)})
    return Outcome(
        launches={name: (_of(one, built[name]),) for name, one in found.items()},
        definition=first.definition if first else "",
        load=first.load if first else None,
        failures={},
    )


def _of(one: Measured, build_s: float | None) -> Launch:
    peak = one.measurement.memory.process_peak if one.measurement else None
    return Launch(blocks_ms=one.blocks, process_peak_bytes=peak, build_s=build_s)


def _build_s(side: Place, folder: Path) -> float | None:
    if side.onnx is None or backends.find(side.backend).unavailable():
        return None
    job = EngineJob(backend=side.backend, onnx=str(side.onnx), directory=str(folder), target=targets.load(side.target))
    answer = worker.call(serde.to_json(job), directory=folder / "job", timeout_s=_BUILD_TIMEOUT_S)
    return serde.from_json(Engine, answer["engine"], where=side.backend).build_s
