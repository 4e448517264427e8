"""Files in numbered parts, NAME.000, NAME.001 and so on, each under a transfer's limit: cut, checked by SHA256SUMS, joined."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
_PART = re.compile(r"(?P<name>.+)\.\d{3}")


class Damaged(Exception):
    """A part is missing or is not what SHA256SUMS says; the sentence names it."""


class Parts(io.RawIOBase):
    """A write-only stream that is cut into numbered files of at most `size` bytes."""

    def __init__(self, base: Path, size: int) -> None:
        self.base, self.size, self.paths = base, size, []
        self._left, self._file = 0, None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        total = len(view)
        while view:
            if not self._left:
                self._next()
            count = min(self._left, len(view))
            self._file.write(view[:count])
            self._left -= count
            view = view[count:]
        return total

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        self.paths.append(self.base.with_name(f"{self.base.name}.{len(self.paths):03d}"))
        self._file, self._left = self.paths[-1].open("wb"), self.size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


class Joined(io.RawIOBase):
    """The parts in order, as one read-only stream."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._pieces = self._read(paths)
        self._rest = b""

    @staticmethod
    def _read(paths: Sequence[Path]) -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    yield piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._pieces, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def sums(folder: Path) -> dict[str, str]:
    """Return the checksums in a folder's SHA256SUMS by the name in it; empty where there is no such file."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {line[64:].strip().lstrip("*").removeprefix("./"): line[:64] for line in lines if line.strip()}


def note_sums(folder: Path, paths: Sequence[Path]) -> None:
    """Write the checksums of files into a folder's SHA256SUMS, beside those that are there."""
    known = sums(folder)
    known |= {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in known.items()))


def cut(folder: Path, part_mb: float) -> list[Path]:
    """Replace every file in a folder that is larger than a part by its parts; return those that were made."""
    size, made = int(part_mb * 2**20), []
    large = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size > size]
    for file in [path for path in large if not _PART.fullmatch(path.name)]:
        with file.open("rb") as whole_file, Parts(file, size) as parts:
            shutil.copyfileobj(whole_file, parts)
        note_sums(folder, parts.paths)
        made += parts.paths
        file.unlink()
    return made


def names(folder: Path, ending: str) -> list[str]:
    """Return the names of the files of a kind in a folder, whole or in parts."""
    found = {path.name for path in folder.iterdir()}
    wholes = found | {match["name"] for name in found if (match := _PART.fullmatch(name))}
    return sorted(name for name in wholes if name.endswith(ending))


def checked(folder: Path, name: str) -> list[Path]:
    """Return the parts of a file in order, each as its checksum says.

    Raises:
        Damaged: a part is missing, is another than it was, or has no checksum.
    """
    listed = {part: digest for part, digest in sums(folder).items() if _PART.fullmatch(part) and part[:-4] == name}
    if not listed:
        raise Damaged(f"{folder / SUMS} has no checksums of the parts of {name}: bring them along")
    for part, digest in listed.items():
        path = folder / part
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise Damaged(f"{path} is missing or damaged: bring it again")
    return [folder / part for part in sorted(listed)]


def whole(folder: Path, name: str, place: Path) -> Path:
    """Return a file of a folder; where it lies there in parts, they are joined into `place`, once.

    Raises:
        Damaged: it is not there, or a part is not as it should be.
    """
    if (folder / name).is_file():
        return folder / name
    joined = place / name
    if not joined.is_file():
        parts = checked(folder, name)
        joined.parent.mkdir(parents=True, exist_ok=True)
        partial = joined.with_name(f"{joined.name}.partial")
        with Joined(parts) as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file)
        partial.replace(joined)
    return joined
