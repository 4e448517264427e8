"""Entries of a store travel between machines by content hash: `pack` makes a parcel of them, `unpack` puts one into a store.

A file's content is in a parcel once, however many entries hold it. What arrives is hashed again before it is believed, and an
entry that is there already is left alone: its key says that it is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from rdeploy.errors import InvariantError
from rdeploy.store import Store

Name = tuple[str, str]
"""An entry's kind and key."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Entries as (path, sha256) of their files, and the contents of those files by hash."""

    entries: Mapping[Name, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    contents: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.contents.values()))


@dataclass(frozen=True, slots=True)
class RecordingStore(Store):
    """A store that remembers which of its entries were used or made."""

    used: set[Name] = field(default_factory=set)

    def get(self, kind: str, key: str) -> Path | None:
        """Return the entry's folder, or None."""
        found = Store.get(self, kind, key)
        if found is not None:
            self.used.add((kind, key))
        return found

    def make(self, kind: str, key: str, write: Callable[[Path], None]) -> Path:
        """Return the entry's folder; `write(folder)` fills it first when there is none yet."""
        made = Store.make(self, kind, key, write)
        self.used.add((kind, key))
        return made


def name_of(path: str | Path, store: Store) -> Name | None:
    """Return the entry that a path lies in, or None where it lies outside of the store."""
    try:
        kind, key = Path(path).relative_to(store.root).parts[:2]
    except ValueError:
        return None
    return kind, key


def pack(store: Store, names: Iterable[Name]) -> Parcel:
    """Return the entries of a store; those that it does not have are left out."""
    entries: dict[Name, tuple[tuple[str, str], ...]] = {}
    contents: dict[str, bytes] = {}
    for kind, key in sorted(set(names)):
        folder = store.get(kind, key)
        if folder is None:
            continue
        files = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            contents[digest] = content
            files.append((file.relative_to(folder).as_posix(), digest))
        entries[kind, key] = tuple(files)
    return Parcel(entries, contents)


def unpack(parcel: Parcel, store: Store) -> tuple[Name, ...]:
    """Put the entries that are not there yet into a store, and return their names.

    Raises:
        InvariantError: a file is not what its hash says, or would lie outside of its entry.
    """
    arrived = tuple(name for name in parcel.entries if store.get(*name) is None)
    for kind, key in arrived:
        files = parcel.entries[kind, key]

        def write(folder: Path, files: tuple[tuple[str, str], ...] = files, where: str = f"{kind}/{key}") -> None:
            for path, digest in files:
                _write(folder, path, digest, parcel.contents.get(digest, b""), where)

        store.make(kind, key, write)
    return arrived


def _write(folder: Path, path: str, digest: str, content: bytes, where: str) -> None:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise InvariantError(f"{where}: {path} lies outside of its entry; the parcel was refused")
    if hashlib.sha256(content).hexdigest() != digest:
        raise InvariantError(f"{where}: {path} arrived changed; run the command again")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
