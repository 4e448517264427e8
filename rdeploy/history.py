"""Snapshots go into an SQLite file, trends with their change points come out; several processes may write at once."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rdeploy import changepoints, evidence, serde
from rdeploy.errors import ConfigError
from rdeploy.snapshot import MACHINE, EngineFacts, Snapshot

_WAIT_S = 60.0
_TABLES = """
create table if not exists runs (
  id integer primary key, at text not null, name text not null, label text not null, verdict text not null,
  machine text not null, facts text not null
);
create table if not exists results (
  run integer not null references runs(id), metric text not null, backend text not null, value real not null,
  primary key (run, metric, backend)
) without rowid;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One entry: when it was added, what it is, a label such as a commit, the gate's verdict, the machine's fingerprint."""

    id: int
    at: str
    name: str
    label: str
    verdict: str
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """One metric over time, oldest first. `changes` are indices into `runs` at which a new level begins."""

    name: str
    metric: str
    backend: str
    machine: str
    runs: tuple[Run, ...]
    values: tuple[float, ...]
    changes: tuple[int, ...]
    levels: tuple[tuple[int, int, float], ...]


def add(path: str | Path, snapshot: Snapshot, *, label: str = "", verdict: str = "", at: str | None = None) -> int:
    """Add a snapshot and return its number.

    Raises:
        ConfigError: the file cannot be written to, or is no history.
    """
    now = at or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = serde.to_json(dict(snapshot.machine))
    machine = serde.digest({name: facts.get(name) for name in MACHINE})[:12]
    with _open(path) as database:
        row = (now, snapshot.name, label, verdict, machine, json.dumps(facts))
        cursor = database.execute(
            "insert into runs(at, name, label, verdict, machine, facts) values (?,?,?,?,?,?)", row
        )
        run = int(cursor.lastrowid or 0)
        database.executemany(
            "insert into results values (?,?,?,?)", [(run, *one) for one in _values(snapshot) if math.isfinite(one[2])]
        )
    return run


def runs(path: str | Path, *, name: str | None = None) -> tuple[Run, ...]:
    """Return the entries, oldest first; only those of one variant where `name` says so.

    Raises:
        ConfigError: there is no such file, or it is no history.
    """
    with _open(path, must_exist=True) as database:
        found = database.execute("select id, at, name, label, verdict, machine from runs order by at, id").fetchall()
    every = (Run(id=r[0], at=r[1], name=r[2], label=r[3], verdict=r[4], machine=r[5]) for r in found)
    return tuple(run for run in every if name in (None, run.name))


def trends(path: str | Path, metric: str, *, name: str | None = None, backend: str | None = None) -> tuple[Trend, ...]:
    """Return the trends of a metric: one for every variant and engine, and for times and memory for every machine.

    Raises:
        ConfigError: there is no such file, it is no history, or it has no such metric.
    """
    by_id = {run.id: run for run in runs(path, name=name)}
    with _open(path, must_exist=True) as database:
        found = database.execute("select run, backend, value from results where metric = ?", (metric,)).fetchall()
        known = sorted(row[0] for row in database.execute("select distinct metric from results"))
    if metric not in known:
        raise ConfigError(f"{path}: no metric {metric!r} in this history; there are: {', '.join(known) or 'none'}")
    apart = metric in evidence.OF_A_LAUNCH
    series: dict[tuple[str, str, str], list[tuple[Run, float]]] = {}
    for run, engine, value in found:
        if run in by_id and backend in (None, engine):
            one = by_id[run]
            series.setdefault((one.name, engine, one.machine if apart else ""), []).append((one, value))
    return tuple(_trend(key, metric, points) for key, points in sorted(series.items()))


def _trend(key: tuple[str, str, str], metric: str, points: list[tuple[Run, float]]) -> Trend:
    points.sort(key=lambda point: (point[0].at, point[0].id))
    values = tuple(value for _, value in points)
    relative = metric not in evidence.SHARES and min(values) > 0
    changes = changepoints.find([math.log(value) for value in values] if relative else values)
    return Trend(
        name=key[0],
        metric=metric,
        backend=key[1],
        machine=key[2],
        runs=tuple(run for run, _ in points),
        values=values,
        changes=changes,
        levels=changepoints.levels(values, changes),
    )


def _values(snapshot: Snapshot) -> Iterator[tuple[str, str, float]]:
    """Yield (metric, backend, value) of everything that a snapshot holds."""
    for metric, value in snapshot.counts.items():
        yield metric, "", float(value)
    for engine in snapshot.engines:
        for metric, found in _of_engine(engine).items():
            if found is not None:
                yield metric, engine.backend, float(found)


def _of_engine(engine: EngineFacts) -> Mapping[str, float | None]:
    found: dict[str, float | None] = {"size": engine.size_bytes}
    for metric, read in evidence.OF_A_LAUNCH.items():
        values = evidence.values(engine.launches, read)
        found[metric] = geometric_mean(values) if values else None
    for metric in ("speedup", "memory_ratio"):
        ratio = evidence.against_native(metric, engine)
        found[metric] = math.exp(ratio[0].mean) if ratio else None
    for metric in ("accuracy", "agreement"):
        share: Any = getattr(engine, metric)
        found[metric] = share.right / share.samples if share and share.samples else None
    return found


@contextlib.contextmanager
def _open(path: str | Path, *, must_exist: bool = False) -> Iterator[sqlite3.Connection]:
    """Yield a connection inside one transaction; waits for other writers, and leaves nothing half done."""
    place = Path(path)
    if must_exist and not place.is_file():
        raise ConfigError(f"{path}: no such history; `rdeploy history add` makes one")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(place, timeout=_WAIT_S, isolation_level=None)) as database:
            # Taken before anything is read: two writers that both read first would both have to give up.
            database.execute("begin immediate")
            for statement in filter(str.strip, _TABLES.split(";")):
                database.execute(statement)
            yield database
            database.execute("commit")
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"{path}: cannot be used as a history ({error})") from error
