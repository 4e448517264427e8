"""What a search has found so far, in one SQLite file of the run folder: it survives a kill, and two processes may share it.

Work is claimed point by point, so that no two processes measure the same one; a claim whose process is gone lapses.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from rdeploy import serde
from rdeploy.errors import ConfigError
from rdeploy.search import Candidate, Evidence

FILE = "run.sqlite"
_WAIT_S = 30.0
_TABLES = """
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS candidates (id TEXT PRIMARY KEY, value TEXT NOT NULL, ruled_out TEXT NOT NULL DEFAULT '');
    CREATE TABLE IF NOT EXISTS points (
        id TEXT PRIMARY KEY, owner INTEGER, started REAL, evidence TEXT, failure TEXT NOT NULL DEFAULT ''
    );
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

    def belongs_to(self, key: str, *, resume: bool) -> None:
        """Tie the run to what was asked for.

        Raises:
            ConfigError: the folder holds another request's run, or this one's and `resume` was not said.
        """
        with self._open() as database:
            row = database.execute("SELECT value FROM facts WHERE name = 'key'").fetchone()
            if row is None:
                database.execute("INSERT INTO facts VALUES ('key', ?)", (key,))
            elif row[0] != key:
                raise ConfigError(f"{self.path.parent}: holds the run of another request; choose another --out")
            elif not resume:
                raise ConfigError(
                    f"{self.path.parent}: holds this run already; go on with --resume, or choose another --out"
                )

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
            row = database.execute("SELECT owner, evidence, failure FROM points WHERE id = ?", (point,)).fetchone()
            if row is not None:
                owner, evidence, failure = row
                if evidence or failure or (owner != os.getpid() and owner and psutil.pid_exists(owner)):
                    return False
            values = (point, os.getpid(), time.time())
            database.execute("INSERT OR REPLACE INTO points (id, owner, started) VALUES (?, ?, ?)", values)
        return True

    def settle(self, point: str, evidence: Evidence | None, *, failure: str = "") -> None:
        """Write down what was measured of a point, or why nothing was."""
        told = None if evidence is None else serde.dumps(evidence)
        with self._open() as database:
            values = (point, told, failure)
            database.execute("INSERT OR REPLACE INTO points (id, evidence, failure) VALUES (?, ?, ?)", values)

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
