"""What a process occupies, read from the kernel: resident bytes, their peak, and the limit it lives under (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rdeploy.types import Memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUPS = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"
_UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" with a huge number of whole pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resident bytes of the process that a session lives in; None where the system does not tell.

    `before_open`: the interpreter, NumPy and the inputs. `after_open`: the engine is loaded. `peak_open` and
    `peak_run`: the highest while it was opened and while it ran; `peak_was_reset` says that the two are apart.
    """

    before_open: int | None
    after_open: int | None
    peak_open: int | None
    peak_run: int | None
    peak_was_reset: bool


def rss_bytes(status: Path = _STATUS) -> int | None:
    """Return the resident set of this process (VmRSS), or None where /proc does not tell."""
    return _status_field("VmRSS", status)


def peak_bytes(status: Path = _STATUS) -> int | None:
    """Return the highest resident set since the start or the last `reset_peak` (VmHWM), or None."""
    return _status_field("VmHWM", status)


def reset_peak(clear_refs: Path = _CLEAR_REFS) -> bool:
    """Make the peak start again from what is resident now; False where the kernel does not allow it."""
    try:
        clear_refs.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def limit_bytes(*, proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> tuple[int, str] | None:
    """Return the tightest memory limit of this process's control groups and the file that says so, or None.

    Follows cgroup v2 (`memory.max`) and v1 (`memory.limit_in_bytes`) from the process's own group up to the root; in a
    container the group's path may not exist inside, and the root then holds the container's limit.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[tuple[int, str]] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            found += _limits(cgroups, group, "memory.max")
        elif "memory" in controllers.split(","):
            found += _limits(cgroups / "memory", group, "memory.limit_in_bytes")
    return min(found, default=None)


def split(usage: Usage, *, weights: int | None, activations: int | None) -> Memory:
    """Return the parts of a session's memory, each with the method that found it.

    `weights` and `activations` are analytic and come from outside. `workspace` is what the runs occupy beyond them and
    beyond the process before the engine was opened: the runtime's own code, plans, scratch and packed copies.
    """
    peaks = [peak for peak in (usage.peak_open, usage.peak_run) if peak is not None]
    workspace, how = _workspace(usage, weights, activations)
    return Memory(
        weights=weights,
        activations=activations,
        workspace=workspace,
        process_peak=max(peaks, default=None),
        method=(
            ("weights", "analytic: constants of the graph"),
            ("activations", "analytic: largest sum of live tensors"),
            ("workspace", how),
            ("process_peak", "VmHWM of the engine's own process, opening and running"),
        ),
    )


def _workspace(usage: Usage, weights: int | None, activations: int | None) -> tuple[int | None, str]:
    if usage.peak_run is None or usage.before_open is None or weights is None or activations is None:
        return None, "unknown: a term of the residual is missing"
    peak = "peak of the runs" if usage.peak_was_reset else "peak since the start (the kernel does not reset it)"
    rest = usage.peak_run - usage.before_open - weights - activations
    how = f"residual: {peak} - resident before opening - weights - activations"
    return max(0, rest), how if rest >= 0 else how + ", negative, shown as 0"


def _status_field(name: str, status: Path) -> int | None:
    try:
        text = status.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _limits(mount: Path, group: str, file: str) -> list[tuple[int, str]]:
    folder = mount / group.lstrip("/")
    found = []
    for place in (folder, *folder.parents):
        if not place.is_relative_to(mount):
            break
        try:
            text = (place / file).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            found.append((int(text), str(place / file)))
    return found
