"""What a process occupies, on the host and on a GPU: bytes, their peak, and the limit it lives under (Linux)."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rdeploy import hardware
from rdeploy.machine import Gpu
from rdeploy.measured import Memory

_SMAPS = Path("/proc/self/smaps_rollup")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUPS = Path("/sys/fs/cgroup")
_RESET_PEAK = "5"
_UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" with a huge number of whole pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes of the process that a session lives in; None where the system does not tell.

    `before_open`: the interpreter and NumPy. `runtime`: the runtime's libraries are loaded too. `after_open`: the engine
    is loaded. `peak_open` and `peak_run`: the highest while it was opened and while it ran; `peak_was_reset` says that
    the two are apart. `private`: what only this process holds. The `device_` ones are GPU memory, read as
    `device_method` says.
    """

    before_open: int | None
    after_open: int | None
    peak_open: int | None
    peak_run: int | None
    peak_was_reset: bool
    runtime: int | None = None
    private: int | None = None
    device_context: int | None = None
    device_peak: int | None = None
    device_method: str = ""


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


def private_bytes(smaps: Path = _SMAPS) -> int | None:
    """Return what only this process holds (Private_Clean + Private_Dirty of smaps_rollup), or None.

    Libraries that other processes map as well are in the resident set, and not in this.
    """
    try:
        found = re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", smaps.read_text(), re.MULTILINE)
    except OSError:
        return None
    return sum(int(kilobytes) for kilobytes in found) * 1024 if found else None


class DeviceMemory:
    """GPU memory of this process; `method` says how it is read, or why it is not.

    A Jetson's GPU lives in the host's memory: what the driver maps for a process (nvmap) is in no resident set, and only
    root may read it. Elsewhere NVML tells the process's own use, or, where it does not see the process (in a container),
    the GPU's use less what it was when this was made. Without either, `free` (cudaMemGetInfo) tells what became less
    since its first call, which makes the CUDA context: that is not in it.
    """

    def __init__(
        self,
        gpu: Gpu | None,
        *,
        free: Callable[[], int] | None = None,
        root: Path = hardware.ROOT,
        pid: int | None = None,
    ) -> None:
        shared = hardware.jetson_model(root) is not None
        self._gpu, self._free, self._pid = None if shared else gpu, free, os.getpid() if pid is None else pid
        self._free_before: int | None = None
        self._clients = root / "sys/kernel/debug/nvmap/iovmm/clients"
        self._is_mapped = shared and self._clients.is_file() and os.access(self._clients, os.R_OK)
        self._before = None if self._gpu is None else self._gpu.state().memory_used_bytes
        self.method = self._method(shared)

    def read(self) -> int | None:
        """Return the bytes now."""
        if self._is_mapped:
            return self._mapped()
        if self._gpu is None:
            return self._less_free()
        own = self._gpu.used_by_bytes(self._pid)
        used = self._gpu.state().memory_used_bytes
        rest = None if used is None or self._before is None else max(0, used - self._before)
        return rest if own is None else own

    def _method(self, shared: bool) -> str:
        if self._is_mapped:
            return "nvmap: the GPU's share of the host's memory"
        if self._gpu is not None:
            return "NVML: this process, or the GPU's growth where it is not told apart"
        if self._free is not None:
            where = ", shared with the host" if shared else ""
            return f"cudaMemGetInfo: what became less free since the context was made{where}"
        return f"only root may read {self._clients}" if shared else "no GPU, or no NVML to ask"

    def _less_free(self) -> int | None:
        if self._free is None:
            return None
        free = self._free()
        self._free_before = free if self._free_before is None else self._free_before
        return max(0, self._free_before - free)

    def _mapped(self) -> int | None:
        try:
            lines = self._clients.read_text().splitlines()
        except OSError:
            return None
        # CLIENT  PROCESS  PID  SIZE, the size as 1234K
        sizes = [line.split() for line in lines]
        found = [int(words[3].rstrip("K")) for words in sizes if len(words) == 4 and words[2] == str(self._pid)]
        return sum(found) * 1024


class Peak:
    """The highest of what `read` returns while this context is open, looked at every 20 ms."""

    def __init__(self, read: Callable[[], int | None], *, every_s: float = 0.02) -> None:
        self._read, self._every_s = read, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes: int | None = None

    def look(self) -> None:
        """Look now."""
        now = self._read()
        if now is not None:
            self.bytes = max(now, self.bytes or 0)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            self.look()


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


def split(usage: Usage, *, weights: int | None, activations: int | None, build_peak: int | None = None) -> Memory:
    """Return the parts of a session's memory, each with the method that found it.

    `weights` and `activations` are analytic, `build_peak` was measured where the engine was built: they come from
    outside. `context` is the runtime before it has an engine. `workspace` is what the runs occupy beyond all of these
    and beyond the process before: plans, scratch and packed copies.
    """
    peaks = [peak for peak in (usage.peak_open, usage.peak_run) if peak is not None]
    workspace, how = _workspace(usage, weights, activations)
    limit = limit_bytes()
    return Memory(
        weights=weights,
        activations=activations,
        workspace=workspace,
        process_peak=max(peaks, default=None),
        context=_context(usage),
        private=usage.private,
        device_context=usage.device_context,
        device_peak=usage.device_peak,
        build_peak=build_peak,
        limit=None if limit is None else limit[0],
        method=(
            ("weights", "analytic: constants of the graph"),
            ("activations", "analytic: largest sum of live tensors"),
            ("workspace", how),
            ("process_peak", "VmHWM of the engine's own process, opening and running"),
            ("context", "VmRSS after the runtime's libraries were loaded - before"),
            ("private", "smaps_rollup: private pages after the runs"),
            ("device_context", usage.device_method),
            ("device_peak", usage.device_method),
            ("build_peak", "VmHWM of the process that built the engine"),
            ("limit", "no limit" if limit is None else limit[1]),
        ),
    )


def near_limit(found: Memory) -> str | None:
    """Say that a process came within a tenth of what its control group allows, or None."""
    if not found.limit or not found.process_peak or found.process_peak < 0.9 * found.limit:
        return None
    return (
        f"its peak of {found.process_peak / 1e6:.0f} MB is near the control group's limit of {found.limit / 1e6:.0f} MB"
    )


def _context(usage: Usage) -> int | None:
    if usage.runtime is None or usage.before_open is None:
        return None
    return max(0, usage.runtime - usage.before_open)


def _workspace(usage: Usage, weights: int | None, activations: int | None) -> tuple[int | None, str]:
    if usage.peak_run is None or usage.before_open is None or weights is None or activations is None:
        return None, "unknown: a term of the residual is missing"
    peak = "peak of the runs" if usage.peak_was_reset else "peak since the start (the kernel does not reset it)"
    context = _context(usage)
    rest = usage.peak_run - usage.before_open - weights - activations - (context or 0)
    terms = "resident before opening - weights - activations" + ("" if context is None else " - context")
    how = f"residual: {peak} - {terms}"
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
