"""A content-addressed cache of folders: the same inputs give the same key, and work that was done is not done again.

An entry is written to a temporary folder and renamed, so a reader never sees half of one and a killed process leaves
at most a temporary folder, which the next run removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from rdeploy.errors import ConfigError

_TEMPORARY = ".partial-"
_REPLACED = ".replaced-"


def default_root() -> Path:
    """Return `$RDEPLOY_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("RDEPLOY_CACHE") or platformdirs.user_cache_dir("rdeploy"))


@dataclass(frozen=True, slots=True)
class Store:
    """Entries live at `root/kind/key/`; `hits` of an entry refresh its age for `prune`."""

    root: Path

    def get(self, kind: str, key: str) -> Path | None:
        """Return the entry's folder, or None."""
        entry = self.root / kind / key
        if not entry.is_dir():
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)
        return entry

    def make(self, kind: str, key: str, write: Callable[[Path], None]) -> Path:
        """Return the entry's folder; `write(folder)` fills it first when there is none yet."""
        if (entry := self.get(kind, key)) is not None:
            return entry
        entry = self.root / kind / key
        with atomic_folder(entry) as folder:
            write(folder)
        return entry

    def prune(self, max_bytes: int) -> int:
        """Remove the entries used longest ago until at most `max_bytes` remain; return how many were removed."""
        entries = [e for e in self.root.glob("*/*") if e.is_dir() and not e.name.startswith(_TEMPORARY)]
        entries.sort(key=lambda e: e.stat().st_mtime)
        sizes = {e: sum(f.stat().st_size for f in e.rglob("*") if f.is_file()) for e in entries}
        total, removed = sum(sizes.values()), 0
        for entry in entries:
            if total <= max_bytes:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]
            removed += 1
        return removed


@contextlib.contextmanager
def atomic_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `final` that becomes `final` in one rename when the block ends well.

    With `replace` an existing folder is swapped out; without it an existing folder (another process was faster) stays.
    Leftovers of processes that were killed are removed on the way.

    Raises:
        ConfigError: the place cannot be written to, or is full.
    """
    with _explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_mine()}{os.getpid()}-", dir=final.parent))
        temporary.chmod(0o777 & ~_umask())
    try:
        with _explained(final):
            yield temporary
            _move(temporary, final, replace=replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _explained(final: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        short_write = error.errno is None and "requested and" in str(error)  # NumPy's, which has no number
        if error.errno not in _REFUSALS and not short_write:
            raise
        reason = error.strerror or "no space left"
        raise ConfigError(f"cannot write {final}: {reason}; free some space or choose another folder") from error


_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def _move(temporary: Path, final: Path, *, replace: bool) -> None:
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if replace and not _exchange(temporary, final):
            old = final.with_name(_REPLACED + final.name)
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one system call (Linux `renameat2` with RENAME_EXCHANGE); False where that is not offered."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of this host's dead processes; put back a folder whose swap was cut in two."""
    for folder in parent.glob(f"{_mine()}*"):
        pid = folder.name.removeprefix(_mine()).split("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    for old in parent.glob(f"{_REPLACED}*"):
        final = old.with_name(old.name.removeprefix(_REPLACED))
        if not final.exists():
            with contextlib.suppress(FileNotFoundError):
                old.rename(final)


def _mine() -> str:
    return f"{_TEMPORARY}{socket.gethostname()}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
