"""The measure job: one child process per engine, asked in turn, so that disturbances hit all alike."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rdeploy import machine, measure, memory, serde
from rdeploy.errors import ConfigError
from rdeploy.measured import Measurement, Memory
from rdeploy.results import Failure
from rdeploy.types import Timing
from rdeploy.worker import process
from rdeploy.worker.channel import Channel, SessionFailed
from rdeploy.worker.jobs import Entry, Measured, MeasureJob, SessionJob
from rdeploy.worker.questions import ask_all

_NOT_BYTES = ("peak_was_reset", "device_method")
_SLOWEST = 20.0
"""A block may take this many times what the warm-up promised, on top of the timeout of an answer."""


def measure_interleaved(job: MeasureJob, *, directory: Path) -> tuple[Measured, ...]:
    """Measure all entries in rounds of short blocks, in a new seeded random order every round.

    Every engine lives in its own child process and sleeps while another one runs. Rounds go on until each has both
    `min_samples` and `min_time_s` of runs; one that reaches `max_samples` or `max_time_s` drops out. An engine that
    fails, crashes or does not answer becomes a `Measured` with its failure; the others go on. `directory` gets a job
    file and a log for every child.

    Raises:
        ConfigError: no entries, or two with the same name.
    """
    names = [entry.name for entry in job.entries]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"a measure job needs entries with different names, not {names}")
    process.mark_stage("measure")
    runs = [_Run(entry=entry, timing=job.timing) for entry in job.entries]
    gpu = machine.gpu()
    before = machine.snapshot(gpu=gpu)
    try:
        for index, run in enumerate(runs):
            _guarded(run, _start, job, directory / f"session-{index}")
        for step in (_open, _warm):
            for run in runs:
                _guarded(run, step, job)
        _rounds(runs, job)
        after = machine.snapshot(gpu=gpu)
        for run in runs:
            _guarded(run, _account, job, before, after)
        for run in runs:
            _guarded(run, _ask, job)
    finally:
        for run in runs:
            if run.channel is not None:
                run.channel.stop()
    return tuple(run.outcome(reproduce=f"rdeploy worker {directory / 'job.json'}") for run in runs)


@dataclass(slots=True, kw_only=True)
class _Run:
    """What is known of one entry while it is measured."""

    entry: Entry
    timing: Timing
    channel: Channel | None = None
    blocks: list[tuple[float, ...]] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)
    device_clock: str = ""
    runs_per_block: int = 1
    settle: int = 0
    warm_up: measure.WarmUp | None = None
    details: dict[str, float | None] = field(default_factory=dict)
    measurement: Measurement | None = None
    failure: SessionFailed | None = None

    @property
    def latencies_ms(self) -> tuple[float, ...]:
        return tuple(latency for block in self.blocks for latency in block)

    @property
    def full(self) -> bool:
        """No further block fits under the ceilings."""
        latencies = self.latencies_ms
        too_many = len(latencies) + self.runs_per_block > self.timing.max_samples
        return bool(latencies) and (too_many or sum(latencies) >= self.timing.max_time_s * 1000.0)

    @property
    def enough(self) -> bool:
        """Both floors are met, or a ceiling is."""
        latencies = self.latencies_ms
        met = len(latencies) >= self.timing.min_samples and sum(latencies) >= self.timing.min_time_s * 1000.0
        return met or self.full

    def outcome(self, *, reproduce: str) -> Measured:
        failure = None
        if self.failure is not None:
            message = str(self.failure).removeprefix(f"{self.failure.stage}: ")
            failure = Failure(stage="measure", error=self.failure.error, message=message, reproduce=reproduce)
        return Measured(
            name=self.entry.name,
            measurement=self.measurement,
            blocks=tuple(self.blocks),
            details=tuple(self.details.items()),
            failure=failure,
        )


def _guarded(run: _Run, step: Callable[..., None], *arguments: object) -> None:
    """Take one step of one entry; its failure ends this entry only."""
    if run.failure is not None:
        return
    try:
        step(run, *arguments)
    except SessionFailed as failure:
        run.failure = failure


def _channel(run: _Run) -> Channel:
    if run.channel is None:
        raise SessionFailed("the engine's process was never started", error="crash")
    return run.channel


def _start(run: _Run, job: MeasureJob, stem: Path) -> None:
    """Start the child; all of them import what they need side by side."""
    entry = serde.from_json(Entry, {**serde.to_json(run.entry), "input": serde.to_json(run.entry.input or job.input)})
    session = SessionJob(entry=entry, timing=job.timing, threads=job.threads, seed=job.seed)
    run.channel = Channel(session, stem=stem)


def _open(run: _Run, job: MeasureJob) -> None:
    """Open the engine. After the last one has answered, every child is up and sleeps until it is asked."""
    opened = _channel(run).ask("open", timeout_s=job.timeout_s)
    run.device_clock = opened.pop("device_clock")
    run.details |= opened


def _warm(run: _Run, job: MeasureJob) -> None:
    """Warm one engine up, while all others sleep."""
    run.warm_up = measure.WarmUp(**_channel(run).ask("warm", timeout_s=job.timeout_s + job.timing.max_warmup_s))
    run.runs_per_block = measure.runs_per_block(run.warm_up.median_ms, job.timing, alone=len(job.entries) == 1)
    # The first run meets the caches that another engine left behind; where one run fills a block it hardly shows.
    run.settle = 1 if run.runs_per_block > 1 else 0


def _rounds(runs: list[_Run], job: MeasureJob) -> None:
    order = random.Random(job.seed)
    while True:
        live = [run for run in runs if run.failure is None]
        if all(run.enough for run in live):
            return
        turn = [run for run in live if not run.full]
        order.shuffle(turn)
        for run in turn:
            _guarded(run, _block, job)


def _block(run: _Run, job: MeasureJob) -> None:
    expected_s = 0.0 if run.warm_up is None else run.warm_up.median_ms * run.runs_per_block / 1000.0
    answer = _channel(run).ask(
        "block", timeout_s=job.timeout_s + _SLOWEST * expected_s, runs=run.runs_per_block, settle=run.settle
    )
    run.blocks.append(tuple(answer["latencies_ms"]))
    run.device_ms += answer["device_ms"]


def _account(run: _Run, job: MeasureJob, before: machine.Snapshot, after: machine.Snapshot) -> None:
    """Collect the memory account and put the measurement together."""
    answer = _channel(run).ask("usage", timeout_s=job.timeout_s)
    latencies, warm, found = run.latencies_ms, run.warm_up, serde.from_json(Memory, answer["memory"])
    run.details |= {f"{name}_bytes": value for name, value in answer["usage"].items() if name not in _NOT_BYTES}
    run.details |= {"runs_per_block": run.runs_per_block, "settle_runs_per_block": run.settle}
    own, full = os.getpid(), memory.near_limit(found)
    run.measurement = Measurement(
        batch=run.entry.batch,
        threads=job.threads,
        latencies_ms=latencies,
        warmup=0 if warm is None else warm.runs,
        stable=warm is not None and warm.stable and measure.is_steady(latencies),
        memory=found,
        load=before.load,
        clock_mhz=after.clock_mhz,
        device_latencies_ms=tuple(run.device_ms),
        device_clock=run.device_clock,
        unfit=machine.unfit(before, after, own=own) + (() if full is None else (full,)),
        machine=machine.describe(before, after, own=own),
    )


def _ask(run: _Run, job: MeasureJob) -> None:
    """Ask for what the job wants beyond latency, then let the engine go."""
    if run.measurement is not None:
        run.measurement = ask_all(_channel(run), run.entry, run.measurement, job)
    with contextlib.suppress(SessionFailed):  # what was measured is here; how a library ends is not ours to judge
        _channel(run).ask("close", timeout_s=job.timeout_s)
