"""What a run costs in joules, by the meters that this machine has: RAPL, NVML, or a Jetson's INA3221.

A meter is cumulative: its domains' joules since some moment. What only tells watts (INA3221, older GPUs) is sampled
and summed up in a thread. The machine as a whole is metered, not one process: an idle reading is taken beside it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rdeploy.hardware import ROOT
from rdeploy.machine import Gpu
from rdeploy.measured import Energy

_SAMPLE_S = 0.02
_MIN_RUNS = 10
_WHOLE = ("VDD_IN", "SYS_VIN_HV", "POM_5V_IN")
"""The rails of Jetson boards through which everything goes; without one of them the rails are summed up."""

Read = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One kind of meter: `read` gives joules by domain, or watts where it is not `cumulative`.

    A counter starts again from 0 at `wraps[domain]`; `whole` names the domains whose sum is the total.
    """

    method: str
    read: Read
    cumulative: bool = True
    wraps: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()


def find(root: Path = ROOT, *, gpu: Gpu | None = None) -> tuple[tuple[Source, ...], str]:
    """Return the meters that can be read here, and why there is none where that is so."""
    rapl, why = _rapl(root)
    sources = [source for source in (rapl, _ina(root), _nvml(gpu)) if source is not None]
    return tuple(sources), "" if sources else why


def per_run(
    run: Callable[[], object],
    sources: tuple[Source, ...],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    """Run for `seconds` (at least 10 runs) beside the meters, after half that time idle."""
    with contextlib.ExitStack() as stack:
        meters = [stack.enter_context(_Meter(source)) for source in sources]
        idle_from = _read(meters)
        idle_at = clock()
        sleep(seconds / 2)
        start_from, started = _read(meters), clock()
        runs = 0
        while runs < _MIN_RUNS or clock() - started < seconds:
            run()
            runs += 1
        end, ended = _read(meters), clock()
    spent = {name: end[name] - start_from[name] for name in end}
    idle = {name: start_from[name] - idle_from[name] for name in end}
    whole = [name for meter in meters for name in meter.whole(end)]
    total, elapsed_s = sum(spent[name] for name in whole), ended - started
    return Energy(
        joules_per_run=total / runs,
        watts=total / elapsed_s,
        idle_watts=sum(idle[name] for name in whole) / (started - idle_at),
        domains=tuple((name, joules / runs) for name, joules in spent.items()),
        runs=runs,
        method="; ".join(source.method for source in sources),
    )


class _Meter:
    """A source made cumulative and free of wraps; a sampled one sums up in a thread while it is entered."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._total: dict[str, float] = dict.fromkeys(source.read(), 0.0)
        self._last, self._at = dict(source.read()), time.perf_counter()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Meter:
        if not self._source.cumulative:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def joules(self) -> dict[str, float]:
        """Return the joules of every domain since this meter was made."""
        with self._lock:
            now, at = dict(self._source.read()), time.perf_counter()
            for name, value in now.items():
                self._total[name] += self._step(name, value, at - self._at)
            self._last, self._at = now, at
            return dict(self._total)

    def whole(self, domains: Mapping[str, float]) -> list[str]:
        """Return the domains of this meter that make up the total."""
        mine = [name for name in domains if name in self._total]
        return [name for name in self._source.whole if name in mine] or mine

    def _step(self, name: str, value: float, elapsed_s: float) -> float:
        last = self._last[name]
        if not self._source.cumulative:
            return (last + value) / 2 * elapsed_s
        return value - last if value >= last else value - last + self._source.wraps.get(name, 0.0)

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self.joules()


def _read(meters: list[_Meter]) -> dict[str, float]:
    return {name: value for meter in meters for name, value in meter.joules().items()}


def _rapl(root: Path) -> tuple[Source | None, str]:
    """Return the CPU packages' and their memory's counters; "core" and "uncore" are parts of the package."""
    files: dict[str, Path] = {}
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = _text(folder / "name")
        if name.startswith(("package", "dram")):
            files[name if name not in files else f"{name} {folder.name}"] = folder / "energy_uj"
    if not files:
        return None, "no meter: neither RAPL (/sys/class/powercap) nor NVML nor an INA3221 is here"
    if not all(_text(file).isdigit() for file in files.values()):
        hint = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        return None, f"RAPL is here, but only root may read it ({hint})"
    wraps = {name: _micro(file.with_name("max_energy_range_uj")) for name, file in files.items()}
    method = "RAPL counters of the whole CPU package (/sys/class/powercap)"
    return Source(method=method, read=lambda: {name: _micro(file) for name, file in files.items()}, wraps=wraps), ""


def _ina(root: Path) -> Source | None:
    rails: dict[str, tuple[Path, Path]] = {}
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(folder / "name") != "ina3221":
            continue
        for label in sorted(folder.glob("in*_label")):
            number = label.name[2:-6]
            voltage, current = folder / f"in{number}_input", folder / f"curr{number}_input"
            if _text(voltage).isdigit() and _text(current).isdigit():
                rails[_text(label)] = (voltage, current)
    if not rails:
        return None

    def watts() -> dict[str, float]:
        return {name: _number(voltage) * _number(current) / 1e6 for name, (voltage, current) in rails.items()}

    whole = tuple(name for name in _WHOLE if name in rails)[:1]
    return Source(method="INA3221 of the board, sampled", read=watts, cumulative=False, whole=whole)


def _nvml(gpu: Gpu | None) -> Source | None:
    if gpu is None:
        return None
    if gpu.energy_j() is not None:
        return Source(method="NVML energy counter of the GPU", read=lambda: {"gpu": gpu.energy_j() or 0.0})
    if gpu.power_w() is not None:
        read: Read = lambda: {"gpu": gpu.power_w() or 0.0}  # noqa: E731 - one line says it
        return Source(method="NVML power of the GPU, sampled", read=read, cumulative=False)
    return None


def _micro(file: Path) -> float:
    return _number(file) / 1e6


def _number(file: Path) -> float:
    text = _text(file)
    return float(text) if text.isdigit() else 0.0


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace").strip()
    return ""
