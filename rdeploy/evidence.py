"""The launches of two engines go in, how one metric changed and how sure that is comes out, before any budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from rdeploy import intervals
from rdeploy.intervals import Estimate
from rdeploy.snapshot import EngineFacts, Launch

HIGHER_IS_BETTER = ("throughput", "speedup", "qdq_coverage", "accuracy", "agreement")
SHARES = ("qdq_coverage", "accuracy", "agreement")

_PROCESS_EFFECT = 0.02
"""Standard deviation between processes with the same engine, taken where only one was measured (benchmarks/gate.md)."""
_SESSION_EFFECT = 0.05
"""Standard deviation between two occasions on one machine: no number of launches in one hour shows the next day."""
_MEMORY_EFFECT = 0.005
_NORMAL_95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one metric's change before a budget is laid against it."""

    worse: Estimate
    baseline: float
    current: float
    basis: str
    launches: int = 0
    """How many launches more of the same would sharpen; 0 where more cannot be had this way."""


OF_A_LAUNCH: dict[str, Callable[[Launch], float | None]] = {
    "latency": lambda launch: launch.latency_ms if launch.blocks_ms else None,
    "throughput": lambda launch: 1000.0 / launch.mean_ms if launch.blocks_ms else None,
    "memory": lambda launch: launch.process_peak_bytes,
    "build_time": lambda launch: launch.build_s,
}


def values(launches: Sequence[Launch], read: Callable[[Launch], float | None]) -> list[float]:
    """Return what was read of each launch, without those that do not have it."""
    return [value for value in map(read, launches) if value]


def side_by_side(metric: str, now: list[float], before: list[float]) -> Evidence:
    """Return the change between launches that were measured in pairs; at least two of them."""
    return Evidence(
        worse=_worse(metric, intervals.paired(now, before)),
        baseline=_middle(before),
        current=_middle(now),
        basis=f"{len(now)} launches side by side",
        launches=len(now),
    )


def on_two_occasions(metric: str, now: list[float], before: list[float]) -> Evidence:
    """Return the change between launches of two occasions on the same machine."""
    change = intervals.difference(_occasion(metric, now), _occasion(metric, before))
    basis = f"{_launches(len(now))} now, {_launches(len(before))} then, on the same machine"
    return Evidence(worse=_worse(metric, change), baseline=_middle(before), current=_middle(now), basis=basis)


def _occasion(metric: str, values: list[float]) -> Estimate:
    logs = [math.log(value) for value in values]
    alone, apart = (_MEMORY_EFFECT, 0.0) if metric == "memory" else (_PROCESS_EFFECT, _SESSION_EFFECT)
    found = intervals.of_samples(logs) if len(logs) > 1 else intervals.assumed(logs[0], deviation=alone)
    return intervals.difference(found, intervals.assumed(0.0, deviation=apart))


def _worse(metric: str, change: Estimate) -> Estimate:
    return -change if metric in HIGHER_IS_BETTER else change


def against_native(metric: str, engine: EngineFacts) -> tuple[Estimate, str] | None:
    """Return the log of native / this (speed-up) or this / native (memory), and what it was found with."""
    read = OF_A_LAUNCH["latency" if metric == "speedup" else "memory"]
    mine, native = values(engine.launches, read), values(engine.native, read)
    if len(mine) == len(native) >= 2:
        estimate = intervals.paired(native, mine) if metric == "speedup" else intervals.paired(mine, native)
        return estimate, _launches(len(mine))
    stored = engine.speedup
    if stored is None:
        return None
    if metric == "speedup":
        low, high = stored.ci95
        within = (math.log(high) - math.log(low)) / (2 * _NORMAL_95)
        deviation = math.hypot(within, _PROCESS_EFFECT, _PROCESS_EFFECT)
        return intervals.assumed(math.log(stored.value), deviation=deviation), "one launch"
    if stored.memory_ratio is None:
        return None
    deviation = math.hypot(_MEMORY_EFFECT, _MEMORY_EFFECT)
    return intervals.assumed(math.log(stored.memory_ratio), deviation=deviation), "one launch"


def ratio_of_ratios(metric: str, first: tuple[Estimate, str], second: tuple[Estimate, str]) -> Evidence:
    """Return the change between two ratios to the native model, each found in a run of its own."""
    change = intervals.difference(first[0], second[0])
    return Evidence(
        worse=_worse(metric, change),
        baseline=math.exp(second[0].mean),
        current=math.exp(first[0].mean),
        basis=f"against native in the same run; {first[1]} now, {second[1]} then",
    )


def _launches(count: int) -> str:
    return "one launch" if count == 1 else f"{count} launches"


def _middle(values: Sequence[float]) -> float:
    return geometric_mean(values) if len(values) > 1 else values[0]
