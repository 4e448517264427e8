"""A variant and its baseline go in, the gate's result comes out: `rdeploy.check`, and `write_baseline` which makes one."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdeploy import baseline, budgets, bundle, intervals, launches, regress, runtime, scores, verdicts
from rdeploy.budgets import Rules
from rdeploy.errors import ConfigError
from rdeploy.evidence import OF_A_LAUNCH
from rdeploy.launches import Outcome, Place
from rdeploy.snapshot import EngineFacts, Snapshot
from rdeploy.verdicts import CheckResult, Finding

LAUNCHES = 6
"""How many launches there are without `--until-decided`, and at its first look."""
MAX_LAUNCHES = 200

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure: see `check`."""

    backend: tuple[str, ...] = ()
    launches: int = LAUNCHES
    until_decided: bool = False
    time_budget_s: float = 120.0
    threads: int | None = None
    seed: int = 0


def check(
    current: str | Path,
    against: str | Path,
    *,
    budget_file: str | Path | None = None,
    rerun_baseline: bool = False,
    measure: bool = False,
    native: str | Path | None = None,
    data: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CheckResult:
    """Compare a variant with its baseline; both are bundles, manifests or baseline JSON files.

    Args:
        budget_file: a YAML of budgets per metric (docs/ci-gate.md); the defaults without one.
        rerun_baseline: measure the engines of both bundles here, side by side.
        measure: measure the current bundle's engines here; with `native`, the native model's bundle beside them.
        data: labelled images on which to compare the accuracy image by image.
        options: `backend`, `launches`, `until_decided`, `time_budget_s`, `threads`, `seed`: which engines, how many
            launches, whether more are measured until every verdict is settled or the time is spent.

    Raises:
        ConfigError: a file is not what it should be, or what is asked for needs a bundle.
    """
    how, rules = Options(**options), budgets.load(budget_file)
    mine, theirs = (_selected(baseline.read(path), how.backend, path) for path in (current, against))
    if not any(mine.engine(one.backend) for one in theirs.engines) and theirs.engines:
        there = ", ".join(one.backend for one in theirs.engines)
        raise ConfigError(f"{current} and {against} have no engine in common; the baseline's: {there}")
    if data is not None:
        mine, theirs = scores.scored(mine, current, data), scores.scored(theirs, against, data)
    measured: dict[str, int] = {}
    said: list[str] = []
    if rerun_baseline or measure:
        run = _Gate(rules=rules, how=how, progress=progress, rerun=rerun_baseline, started=time.monotonic(), notes=said)
        mine, theirs, findings, measured = run.compare(mine, theirs, _folders(current, against, native, rerun_baseline))
    elif how.until_decided:
        raise ConfigError("--until-decided measures: it needs --rerun-baseline or --measure")
    else:
        findings = regress.compare(mine, theirs, rules)
    return _result(mine, theirs, findings, rules, measured, update=_update(current, against), said=said)


def write_baseline(
    current: str | Path,
    path: str | Path,
    *,
    native: str | Path | None = None,
    data: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Snapshot:
    """Write a baseline JSON file of a bundle: counts, fingerprint and the raw samples of `launches` launches measured here.

    With `launches` 0 nothing is measured: the file holds what the build found. `native` and `data` as for `check`.

    Raises:
        ConfigError: the source is not what it should be, or the place cannot be written to.
    """
    how = Options(**options)
    found = _selected(baseline.read(current), how.backend, current)
    if data is not None:
        found = scores.scored(found, current, data)
    if how.launches and bundle.is_bundle(current):
        folders = {"current": bundle.folder_of(current)} | ({"native": bundle.folder_of(native)} if native else {})
        for engine in found.engines:
            places, reason = _places(engine.backend, folders)
            if reason:
                continue
            outcome = launches.measure(places, how.launches, threads=how.threads, seed=how.seed, progress=progress)
            found = _with(found, engine.backend, outcome, "current", how)
    baseline.write(path, found)
    return found


@dataclass(slots=True, kw_only=True)
class _Gate:
    """One measuring check: launches of every backend, looked at until the verdicts are settled."""

    rules: Rules
    how: Options
    rerun: bool
    progress: Progress | None
    started: float
    notes: list[str] = field(default_factory=list)

    def compare(
        self, mine: Snapshot, theirs: Snapshot, folders: dict[str, Path]
    ) -> tuple[Snapshot, Snapshot, tuple[Finding, ...], dict[str, int]]:
        """Return both snapshots with their launches, the findings, and how many launches each backend took."""
        looks, counts = {}, {}
        if not self.rerun:
            mine = dataclasses.replace(mine, machine=baseline.here())
        for engine in theirs.engines:
            places, reason = _places(engine.backend, folders)
            if reason:
                mine = _replace(mine, engine.backend, launches=(), native=())
                self.notes.append(f"{engine.backend} is not measured: {reason}")
                continue
            mine, theirs, looks[engine.backend], counts[engine.backend] = self._settle(
                mine, theirs, engine.backend, places
            )
        return mine, theirs, self._findings(mine, theirs, looks), counts

    def _settle(
        self, mine: Snapshot, theirs: Snapshot, backend: str, places: dict[str, Place]
    ) -> tuple[Snapshot, Snapshot, int, int]:
        """Measure one backend until its verdicts are settled or the time is spent; without until_decided, once."""
        outcome, look, wanted = Outcome(launches=dict.fromkeys(places, ()), failures={}), 0, self.how.launches
        began = time.monotonic()
        while True:
            have, look = len(outcome.launches["current"]), look + 1
            outcome = outcome + launches.measure(
                places,
                wanted - have,
                threads=self.how.threads,
                seed=self.how.seed + have,
                build=self.rules.of("build_time", backend) is not None,
                progress=self.progress,
            )
            mine = _with(mine, backend, outcome, "current", self.how)
            if self.rerun:
                theirs = _with(theirs, backend, outcome, "baseline", self.how)
            have = len(outcome.launches["current"])
            if outcome.failures or not self.how.until_decided:
                return mine, theirs, look, have
            findings = self._findings(mine, theirs, {backend: look})
            following = intervals.next_look(have)
            if not _open(findings, backend) or following > MAX_LAUNCHES or self._too_late(began, have, following):
                return mine, theirs, look, have
            wanted = following

    def _findings(self, mine: Snapshot, theirs: Snapshot, looks: dict[str, int]) -> tuple[Finding, ...]:
        return regress.compare(
            mine, theirs, self.rules, paired=self.rerun, looks=looks if self.how.until_decided else None
        )

    def _too_late(self, began: float, have: int, following: int) -> bool:
        """Whether the launches up to the next look would not fit into the time that is left."""
        now = time.monotonic()
        each_s = (now - began) / max(1, have)
        return now - self.started + (following - have) * each_s > self.how.time_budget_s


def _open(findings: Sequence[Finding], backend: str) -> bool:
    """Whether more launches could still settle something."""
    measured = (*OF_A_LAUNCH, "speedup", "memory_ratio")
    return any(
        one.verdict == verdicts.INCONCLUSIVE and one.backend == backend and one.metric in measured for one in findings
    )


def _selected(snapshot: Snapshot, wanted: Sequence[str], path: str | Path) -> Snapshot:
    names = [one.backend for one in snapshot.engines]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"{path} has no {name}; its engines: {', '.join(names) or 'none'}")
    engines = tuple(one for one in snapshot.engines if not wanted or one.backend in wanted)
    return dataclasses.replace(snapshot, engines=engines)


def _folders(current: str | Path, against: str | Path, native: str | Path | None, rerun: bool) -> dict[str, Path]:
    """Return the bundles to measure by side."""
    sides = {"current": current} | ({"baseline": against} if rerun else {}) | ({"native": native} if native else {})
    for side, path in sides.items():
        if not bundle.is_bundle(path):
            option = "--rerun-baseline" if rerun else "--measure"
            raise ConfigError(f"{path}: {option} measures, so the {side} side must be a bundle with its engines")
    return {side: bundle.folder_of(path) for side, path in sides.items()}


def _places(backend: str, folders: dict[str, Path]) -> tuple[dict[str, Place], str]:
    """Return where every side's engine of one backend is, or the reason why it cannot be measured here."""
    places = {}
    for side, folder in folders.items():
        content = bundle.read(folder)
        graphs = {graph["backend"]: graph["path"] for graph in content.get("graphs") or ()}
        entry = next((one for one in content["engines"] if one["backend"] == backend), None)
        if entry is None:
            return {}, f"{folder} has no {backend}"
        if reason := runtime.cannot_run(entry):
            return {}, reason
        places[side] = Place(
            backend=backend,
            path=bundle.verified_engine(folder, entry),
            batch=(entry.get("measurement") or {}).get("batch", 1),
            onnx=folder / graphs.get(backend, "model.onnx"),
            target=content.get("target", "cpu"),
        )
    return places, ""


def _with(snapshot: Snapshot, backend: str, outcome: Outcome, side: str, how: Options) -> Snapshot:
    """Put what was measured in the place of what the build had found."""
    failure = outcome.failures.get(side, "")
    machine = baseline.here()
    facts: dict[str, Any] = {
        "launches": outcome.launches[side],
        "native": outcome.launches.get("native", ()),
        "definition": outcome.definition,
        "load": outcome.load,
        "cores": machine["threads"],
        "threads": how.threads,
    }
    if failure:
        facts["failure"] = f"it could not be measured: {failure}"
    return dataclasses.replace(_replace(snapshot, backend, **facts), machine=machine)


def _replace(snapshot: Snapshot, backend: str, **facts: Any) -> Snapshot:
    engines: tuple[EngineFacts, ...] = tuple(
        dataclasses.replace(one, **facts) if one.backend == backend else one for one in snapshot.engines
    )
    return dataclasses.replace(snapshot, engines=engines)


def _update(current: str | Path, against: str | Path) -> str:
    """Return the command that makes the current variant the baseline."""
    mine, theirs = shlex.quote(str(current)), shlex.quote(str(against))
    if Path(against).is_dir():
        return f"mv {theirs} {theirs}.before && cp -r {mine} {theirs}"
    return f"rdeploy check {mine} --write-baseline {theirs}"


def _result(
    mine: Snapshot,
    theirs: Snapshot,
    findings: tuple[Finding, ...],
    rules: Rules,
    measured: dict[str, int],
    *,
    update: str,
    said: Sequence[str],
) -> CheckResult:
    return CheckResult(
        verdict=verdicts.overall(findings),
        current=mine.name,
        baseline=f"{theirs.name} of {theirs.created}" if theirs.created else theirs.name,
        findings=findings,
        notes=(*regress.notes(mine, theirs), *said),
        confidence=rules.confidence,
        launches=measured,
        update=update,
    )
