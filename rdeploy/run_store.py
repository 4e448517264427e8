"""What a search has found so far, in one SQLite file of the run folder: it survives a kill, and two processes may share it.

Work is claimed point by point, so that no two processes measure the same one; a claim whose process is gone lapses. A process
is known by its number and by when it was started: numbers are given again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from rdeploy import serde
from rdeploy.errors import ConfigError
from rdeploy.search import Candidate, Evidence

FILE, LOCK = "run.sqlite", "run.lock"
_WAIT_S = 30.0
_CLOCK_S = 2.0
"""How far two readings of when a process was started may be apart: the kernel tells it by a clock that is set now and then."""
_TABLES = """
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS candidates (id TEXT PRIMARY KEY, value TEXT NOT NULL, ruled_out TEXT NOT NULL DEFAULT '');
    CREATE TABLE IF NOT EXISTS points (
        id TEXT PRIMARY KEY, owner INTEGER, born REAL, started REAL, evidence TEXT, failure TEXT NOT NULL DEFAULT ''
    );
    CREATE TABLE IF NOT EXISTS begun (owner INTEGER NOT NULL, born REAL NOT NULL);
"""


class RunStore:
    """The state of one run; every method is one transaction."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{self.path}: cannot be used as the record of a run ({error}); choose another --out"
            ) from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("BEGIN IMMEDIATE")
            yield database
            if database.in_transaction:
                database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        finally:
            database.close()

    def belongs_to(self, facts: Mapping[str, str], *, resume: bool) -> None:
        """Tie the run to all that decides what is found.

        A record in which nothing was found yet, and whose process is gone, is nobody's: it is taken over.

        Args:
            facts: a digest of each thing that decides, by what it is called.

        Raises:
            ConfigError: the folder holds a run of which something differs, or this one and `resume` was not said.
        """
        folder = self.path.parent
        with self._open() as database:
            known = dict(database.execute("SELECT name, value FROM facts").fetchall())
            if not known or _is_nobodys(database):
                database.execute("DELETE FROM facts")
                database.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
                database.execute("DELETE FROM begun")
                database.execute("INSERT INTO begun VALUES (?, ?)", _me())
            elif other := [name for name in {**known, **facts} if known.get(name) != facts.get(name)]:
                raise ConfigError(
                    f"{folder}: holds the run of another request; what is not the same: {', '.join(other)}; choose another --out"
                )
            elif not resume:
                raise ConfigError(f"{folder}: holds this run already; go on with --resume, or choose another --out")

    def keep_candidate(self, candidate: Candidate, *, ruled_out: str = "") -> None:
        """Write down a candidate as it is known now, and why it is out if it is."""
        with self._open() as database:
            values = (candidate.variant.id, serde.dumps(candidate), ruled_out)
            database.execute("INSERT OR REPLACE INTO candidates VALUES (?, ?, ?)", values)

    def candidates(self) -> dict[str, tuple[Candidate, str]]:
        """Return every candidate with the reason for which it is out (empty: it is in), by the variant's id."""
        with self._open() as database:
            rows = database.execute("SELECT id, value, ruled_out FROM candidates").fetchall()
        return {name: (serde.from_json(Candidate, serde.loads(value)), out) for name, value, out in rows}

    def claim(self, point: str) -> bool:
        """Take a point to measure; False where it is done, or another living process is at it."""
        with self._open() as database:
            row = database.execute(
                "SELECT owner, born, evidence, failure FROM points WHERE id = ?", (point,)
            ).fetchone()
            if row is not None:
                owner, born, evidence, failure = row
                if evidence or failure or _is_another(owner, born):
                    return False
            values = (point, *_me(), time.time())
            database.execute("INSERT OR REPLACE INTO points (id, owner, born, started) VALUES (?, ?, ?, ?)", values)
        return True

    def elsewhere(self) -> frozenset[str]:
        """Return the points that another living process is at."""
        with self._open() as database:
            rows = database.execute(
                "SELECT id, owner, born FROM points WHERE evidence IS NULL AND failure = ''"
            ).fetchall()
        return frozenset(name for name, owner, born in rows if _is_another(owner, born))

    def settle(self, point: str, evidence: Evidence | None, *, failure: str = "") -> None:
        """Write down what was measured of a point, or why nothing was."""
        told = None if evidence is None else serde.dumps(evidence)
        with self._open() as database:
            values = (point, told, failure)
            database.execute("INSERT OR REPLACE INTO points (id, evidence, failure) VALUES (?, ?, ?)", values)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Keep other processes on this run from measuring meanwhile: they would slow each other down."""
        with self.path.with_name(LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, and so with the process
            yield

    def release(self) -> None:
        """Give back what this process has claimed and not measured."""
        with self._open() as database:
            database.execute("DELETE FROM points WHERE owner = ? AND evidence IS NULL AND failure = ''", (os.getpid(),))

    def evidence(self) -> tuple[Evidence, ...]:
        """Return what was measured so far, by any process."""
        with self._open() as database:
            rows = database.execute("SELECT evidence FROM points WHERE evidence IS NOT NULL ORDER BY id").fetchall()
        return tuple(serde.from_json(Evidence, serde.loads(value)) for (value,) in rows)

    def failures(self) -> dict[str, str]:
        """Return the points that could not be measured, with the reason."""
        with self._open() as database:
            return dict(database.execute("SELECT id, failure FROM points WHERE failure != ''").fetchall())


def _is_nobodys(database: sqlite3.Connection) -> bool:
    """Whether a record has no finding, and no other process is about to find one."""
    found = database.execute("SELECT 1 FROM candidates UNION SELECT 1 FROM points").fetchone()
    beginners = database.execute("SELECT owner, born FROM begun").fetchall()
    return found is None and not any(_is_another(*one) for one in beginners)


def _me() -> tuple[int, float]:
    return os.getpid(), psutil.Process().create_time()


def _is_another(owner: int | None, born: float | None) -> bool:
    """Whether a claim is that of another process which is still alive."""
    if not owner or owner == os.getpid():
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        return abs(psutil.Process(owner).create_time() - (born or 0.0)) < _CLOCK_S
    return False
