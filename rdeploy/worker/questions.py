"""Ask an open engine for what a job wants beyond latency; the measurement comes back with the answers in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from rdeploy import hardware, measure, serde
from rdeploy.measured import EndToEnd, Energy, LayerTimes, Measurement, Paced, Scenario, Throughput
from rdeploy.worker.channel import Channel, SessionFailed
from rdeploy.worker.jobs import Entry, MeasureJob

T = TypeVar("T")

_ROUNDS = 8
"""Blocks at a camera's pace and back to back; 6 pairs are the fewest that carry a verdict."""
_SCENARIO_TIMES = 5


def ask_all(channel: Channel, entry: Entry, found: Measurement, job: MeasureJob) -> Measurement:
    """Return the measurement with everything that the job asks for; what cannot be had is a note with the reason."""
    asked, questions = job.asked, _Questions(channel, job)
    if asked.energy:
        found = dataclasses.replace(found, energy=questions.one("energy", Energy, seconds=asked.seconds))
    if asked.streams:
        found = dataclasses.replace(found, throughput=_throughput(questions, job))
    if asked.fps is not None:
        found = dataclasses.replace(found, paced=_paced(questions, asked.fps, job))
    if asked.layers:
        found = dataclasses.replace(found, layers=questions.one("layers", LayerTimes))
    if asked.images:
        files = list(asked.images)
        found = dataclasses.replace(
            found, end_to_end=questions.one("end_to_end", EndToEnd, images=files, seconds=asked.seconds)
        )
    if asked.scenarios:
        found = dataclasses.replace(found, scenarios=_scenarios(questions, entry, found, job))
    return dataclasses.replace(found, notes=(*found.notes, *questions.notes))


class _Questions:
    """Asks one thing at a time; a refusal becomes a note, and after a crash nothing more is asked."""

    def __init__(self, channel: Channel, job: MeasureJob) -> None:
        self._channel, self._job = channel, job
        self.notes: list[str] = []
        self._over = False

    def one(self, what: str, kind: type[T], **options: Any) -> T | None:
        answer = self.raw(what, **options)
        return None if answer is None else serde.from_json(kind, answer, where=what)

    def raw(self, what: str, *, patience_s: float = 0.0, **options: Any) -> Any:
        if self._over:
            return None
        timeout_s = self._job.timeout_s + _SCENARIO_TIMES * self._job.asked.seconds + patience_s
        try:
            return self._channel.ask("ask", timeout_s=timeout_s, what=what, **options)["found"]
        except SessionFailed as failure:
            reason = str(failure).removeprefix(f"{failure.stage}: ")
            self.notes.append(f"{what.replace('_', ' ')}: {reason}")
            self._over = failure.error in ("crash", "hang")
            return None


def _throughput(questions: _Questions, job: MeasureJob) -> tuple[Throughput, ...]:
    found = []
    for count in job.asked.streams:
        # The CPUs are shared out, unless somebody said how many threads a stream has.
        threads = job.threads or max(1, hardware.cores() // count)
        found.append(questions.one("streams", Throughput, count=count, threads=threads, seconds=job.asked.seconds))
    return tuple(one for one in found if one is not None)


def _paced(questions: _Questions, fps: float, job: MeasureJob) -> Paced | None:
    seconds = job.asked.seconds / 2
    patience_s = _ROUNDS * (2 * seconds + 10 / fps)
    answer = questions.raw("pace", patience_s=patience_s, fps=fps, rounds=_ROUNDS, seconds=seconds)
    if answer is None:
        return None
    cost, interval, verdict = measure.speedup(answer["paced"], answer["back_to_back"], seed=job.seed)
    return Paced(
        fps=fps,
        paced_ms=tuple(one for block in answer["paced"] for one in block),
        back_to_back_ms=tuple(one for block in answer["back_to_back"] for one in block),
        idle_cost=cost,
        idle_cost_ci95=interval,
        verdict={"faster": "slower", "slower": "faster"}.get(verdict, verdict),
        late=answer["late"],
    )


def _scenarios(questions: _Questions, entry: Entry, found: Measurement, job: MeasureJob) -> tuple[Scenario, ...]:
    rate = float(measure.summary(found.latencies_ms, batch=found.batch)["throughput_ips"])
    results = []
    for name in job.asked.scenarios:
        if name == "SingleStream" and entry.batch != 1:
            continue  # one sample at a time is what it is about
        folder = Path(job.asked.logs) / f"{entry.name}-{name}"
        seconds = _SCENARIO_TIMES * job.asked.seconds
        results.append(questions.one("scenario", Scenario, name=name, folder=str(folder), seconds=seconds, rate=rate))
    return tuple(one for one in results if one is not None)
