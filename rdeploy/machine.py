"""Whether this machine was fit to measure on: its state before and after goes in, the reasons against it come out.

Every reader takes the root of the file system, so that a test can put another machine there (Linux).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdeploy import hardware, jetson, nvml
from rdeploy.hardware import ROOT

Gpu = nvml.Gpu | jetson.Gpu

_BUSY = 0.1
"""Share of the CPUs' time that others may take before a latency is doubtful."""
_STOLEN = 0.02
_SLOWED = 0.9
_NAMED = 3
_FIXED_LOW = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
"""Drivers under which the governor "powersave" is a dynamic one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process as /proc has it; `ticks` is CPU time, that of children which it waited for in `waited_ticks`."""

    parent: int
    name: str
    ticks: int
    waited_ticks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Counters and states at one moment; a counter that the kernel does not tell is 0, a state None."""

    busy_ticks: int
    stolen_ticks: int
    total_ticks: int
    cores: int
    load: float | None
    clock_mhz: float | None
    temperature_c: float | None
    throttle_count: int
    quota_stops: int
    quota_stopped_ms: float
    swapped_pages: int
    processes: Mapping[int, Process] = field(default_factory=dict)
    gpu: nvml.GpuState | None = None


def gpu() -> Gpu | None:
    """Return the GPU that a CUDA program would use here, as the driver's management sees it; None without one."""
    here = hardware.gpus()
    if here and hardware.jetson_model() is not None:
        return jetson.Gpu()
    return nvml.find(here[0].pci_bus_id) if here else None


def snapshot(root: Path = ROOT, *, gpu: Gpu | None = None) -> Snapshot:
    """Return what there is to know now; counts only the CPUs that this process may use."""
    cpus = _cpus()
    busy, stolen, total = _cpu_ticks(root, cpus)
    stops, stopped_ms = _quota(root)
    return Snapshot(
        busy_ticks=busy,
        stolen_ticks=stolen,
        total_ticks=total,
        cores=len(cpus),
        load=_load(root),
        clock_mhz=clock_mhz(root),
        temperature_c=_temperature_c(root),
        throttle_count=sum(_numbers(root, "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")),
        quota_stops=stops,
        quota_stopped_ms=stopped_ms,
        swapped_pages=_field(root / "proc/vmstat", "pswpin"),
        processes=_processes(root),
        gpu=None if gpu is None else gpu.state(),
    )


def settings(root: Path = ROOT) -> dict[str, Any]:
    """Return how the CPU is set up: governor, its driver, SMT, turbo; None where the kernel does not tell."""
    cpu = root / "sys/devices/system/cpu"
    turbo = {"0": "on", "1": "off"}.get(_text(cpu / "intel_pstate/no_turbo"))
    boost = {"1": "on", "0": "off"}.get(_text(cpu / "cpufreq/boost"))
    return {
        "governor": _text(cpu / "cpu0/cpufreq/scaling_governor") or None,
        "governor_driver": _text(cpu / "cpu0/cpufreq/scaling_driver") or None,
        "smt": _text(cpu / "smt/control") or None,
        "turbo": turbo or boost,
    }


def clock_mhz(root: Path = ROOT) -> float | None:
    """Return the mean CPU clock now, from cpufreq, else from /proc/cpuinfo (constant in most virtual machines)."""
    found = [
        kilohertz / 1000.0 for kilohertz in _numbers(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    ]
    if not found:
        lines = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(root / "proc/cpuinfo"), re.MULTILINE)
        found = [float(line) for line in lines]
    return sum(found) / len(found) if found else None


def describe(before: Snapshot, after: Snapshot, *, own: int, root: Path = ROOT) -> tuple[tuple[str, Any], ...]:
    """Return the state of the machine between two moments as JSON-able (name, value) pairs; `own` is our process."""
    others, named = _others(before, after, own)
    flags = hardware.cpu_flags(root)
    facts: dict[str, Any] = {
        "cpu": hardware.cpu_model(root),
        "cpu_flags": [flag for flag in hardware.FLAGS_THAT_MATTER if flag in flags],
        "cores": after.cores,
        **settings(root),
        "power_mode": jetson.power_mode(root),
        "cpu_quota": hardware.cpu_quota(root),
        "load_before": before.load,
        "load_after": after.load,
        "clock_before_mhz": before.clock_mhz,
        "clock_after_mhz": after.clock_mhz,
        "temperature_c": after.temperature_c,
        "others_cpus": None if others is None else round(others, 2),
        "others": {name: round(share, 2) for name, share in named},
        "stolen": _share(before, after, "stolen_ticks"),
        "quota_stopped_ms": after.quota_stopped_ms - before.quota_stopped_ms,
    }
    if after.gpu is not None:
        facts["gpu"] = {name: getattr(after.gpu, name) for name in after.gpu.__slots__ if name != "processes"}
    return tuple(facts.items())


def unfit(before: Snapshot, after: Snapshot, *, own: int, root: Path = ROOT) -> tuple[str, ...]:
    """Return why what was measured between two moments is doubtful; empty on a fit machine.

    `own` is the process that measured; what it and its children used is not held against the machine.
    """
    return (
        *_busy(before, after, own),
        *_slowed(before, after, root),
        *_starved(before, after, root),
        *_gpu(before.gpu, after.gpu, _tree(after.processes, own)),
    )


def _busy(before: Snapshot, after: Snapshot, own: int) -> list[str]:
    others, named = _others(before, after, own)
    if others is None or others < _BUSY * after.cores:
        return []
    who = ", ".join(f"{name} {share:.1f}" for name, share in named) or "none that can be seen from here"
    load = "" if before.load is None else f"load {before.load:.1f} on {after.cores} cores: "
    return [f"{load}other processes kept {others:.1f} CPUs busy ({who})"]


def _slowed(before: Snapshot, after: Snapshot, root: Path) -> list[str]:
    found, here = [], settings(root)
    if before.clock_mhz and after.clock_mhz and after.clock_mhz < _SLOWED * before.clock_mhz:
        found.append(f"the CPU's clock fell from {before.clock_mhz:.0f} to {after.clock_mhz:.0f} MHz")
    if (count := after.throttle_count - before.throttle_count) > 0:
        found.append(f"the CPU was too hot and slowed down {count} times")
    if here["governor"] == "powersave" and here["governor_driver"] not in _FIXED_LOW:
        found.append("the governor powersave holds the CPU at its lowest clock")
    return found


def _starved(before: Snapshot, after: Snapshot, root: Path) -> list[str]:
    found, stolen = [], _share(before, after, "stolen_ticks")
    if stolen is not None and stolen > _STOLEN:
        found.append(f"the hypervisor gave {stolen:.0%} of the CPUs' time to others (steal)")
    if (stops := after.quota_stops - before.quota_stops) > 0:
        quota, lost_ms = hardware.cpu_quota(root), after.quota_stopped_ms - before.quota_stopped_ms
        allowed = "" if quota is None else f" of {quota:g} CPUs"
        found.append(f"the control group's quota{allowed} stopped it {stops} times, {lost_ms:.0f} ms in all")
    if (pages := after.swapped_pages - before.swapped_pages) > 0:
        found.append(f"the machine swapped ({pages} pages read back)")
    return found


def _gpu(before: nvml.GpuState | None, after: nvml.GpuState | None, own: frozenset[int]) -> list[str]:
    if before is None or after is None:
        return []
    found = [f"the GPU was slowed down by {reason}" for reason in after.throttled]
    others = [pid for pid, _ in after.processes if pid not in own and pid in dict(before.processes)]
    return found + (
        [f"{len(others)} other processes were on the GPU ({', '.join(map(str, others))})"] if others else []
    )


def _others(before: Snapshot, after: Snapshot, own: int) -> tuple[float | None, list[tuple[str, float]]]:
    """Return how many CPUs other processes kept busy, and the busiest of them with their share of one CPU."""
    total = after.total_ticks - before.total_ticks
    if total <= 0:
        return None, []
    one_cpu, mine = total / after.cores, _tree(after.processes, own)
    used = {pid: _used(pid, before, after) for pid in after.processes}
    waited = after.processes[own].waited_ticks if own in after.processes else 0
    waited -= before.processes[own].waited_ticks if own in before.processes else 0
    rest = after.busy_ticks - before.busy_ticks - sum(used[pid] for pid in mine) - waited
    found = sorted(((ticks / one_cpu, pid) for pid, ticks in used.items() if pid not in mine), reverse=True)
    named = [(f"{after.processes[pid].name} {pid}", share) for share, pid in found[:_NAMED] if share >= _BUSY / 2]
    return max(0.0, rest / one_cpu), named


def _used(pid: int, before: Snapshot, after: Snapshot) -> int:
    earlier = before.processes.get(pid)
    return max(0, after.processes[pid].ticks - (earlier.ticks if earlier else 0))


def _tree(processes: Mapping[int, Process], root: int) -> frozenset[int]:
    """Return a process and all its descendants."""
    found, news = {root}, {root}
    while news:
        news = {pid for pid, one in processes.items() if one.parent in news and pid not in found}
        found |= news
    return frozenset(found & set(processes))


def _share(before: Snapshot, after: Snapshot, name: str) -> float | None:
    total = after.total_ticks - before.total_ticks
    return (getattr(after, name) - getattr(before, name)) / total if total > 0 else None


def _cpus() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _cpu_ticks(root: Path, cpus: frozenset[int]) -> tuple[int, int, int]:
    """Return busy, stolen and all ticks of these CPUs since the start (/proc/stat)."""
    busy = stolen = total = 0
    for number, rest in re.findall(r"^cpu(\d+) (.*)$", _text(root / "proc/stat"), re.MULTILINE):
        if int(number) not in cpus:
            continue
        user, nice, system, idle, waiting, irq, soft, steal, *_ = (*map(int, rest.split()), *[0] * 8)
        busy += user + nice + system + irq + soft
        stolen += steal
        total += user + nice + system + idle + waiting + irq + soft + steal
    return busy, stolen, total


def _processes(root: Path) -> dict[int, Process]:
    found: dict[int, Process] = {}
    for folder in (root / "proc").glob("[0-9]*"):
        # pid (name) state parent ... : the name may hold blanks and brackets
        match = re.match(r"\d+ \((.*)\) \S (.*)", _text(folder / "stat"), re.DOTALL)
        if match is None:
            continue
        fields = match.group(2).split()
        own, waited = (int(fields[i]) + int(fields[i + 1]) for i in (10, 12))
        found[int(folder.name)] = Process(parent=int(fields[0]), name=match.group(1), ticks=own, waited_ticks=waited)
    return found


def _quota(root: Path) -> tuple[int, float]:
    """Return how often, and for how many milliseconds in all, the control group's CPU quota stopped its processes."""
    for folder in (*hardware.control_groups(root, ""), *hardware.control_groups(root, "cpu")):
        stat = folder / "cpu.stat"
        if stops := _field(stat, "nr_throttled"):
            stopped_us = _field(stat, "throttled_usec") or _field(stat, "throttled_time") // 1000
            return stops, stopped_us / 1000.0
    return 0, 0.0


def _load(root: Path) -> float | None:
    words = _text(root / "proc/loadavg").split()
    return float(words[0]) if words else None


def _temperature_c(root: Path) -> float | None:
    """Return the hottest zone that names itself after the CPU or the package, else the hottest of all."""
    zones: list[tuple[bool, float]] = []
    for folder in (root / "sys/class/thermal").glob("thermal_zone*"):
        kind, value = _text(folder / "type").lower(), _text(folder / "temp")
        if value.lstrip("-").isdigit():
            zones.append(("cpu" in kind or "pkg" in kind, int(value) / 1000.0))
    return max(zones)[1] if zones else None


def _numbers(root: Path, pattern: str) -> list[int]:
    texts = [_text(file) for file in root.glob(pattern)]
    return [int(text) for text in texts if text.isdigit()]


def _field(file: Path, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", _text(file), re.MULTILINE)
    return int(match.group(1)) if match else 0


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace").strip()
    return ""
