"""What `rdeploy check` compares: one variant's raw samples, counts and machine at one moment, and how two machines differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

SCHEMA_VERSION = 1

MACHINE = ("host", "cpu", "cpu_flags", "threads", "cpu_quota", "gpu", "board")
"""Facts that decide how fast a machine is: where one differs, absolute times and bytes are not comparable."""
SOFTWARE = ("driver", "os", "python", "runtimes", "rdeploy")
"""Facts that may be the very change under test: a difference is said, and the comparison stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One fresh process with one engine: its latencies by round, its peak memory, how long the engine took to build.

    Launch i of two engines that were measured together was timed in the same rounds.
    """

    blocks_ms: tuple[tuple[float, ...], ...] = ()
    process_peak_bytes: int | None = None
    build_s: float | None = None

    @property
    def latency_ms(self) -> float:
        """The 10th percentile of all runs: what the engine takes where nothing disturbs it.

        A slower engine moves it as it moves the median; busy neighbours hardly do, and scatter the median two to three
        times as much (benchmarks/gate.md). What comes and goes shows in the mean, the throughput.
        """
        runs = sorted(one for block in self.blocks_ms for one in block)
        return runs[math.ceil(0.1 * len(runs)) - 1]

    @property
    def mean_ms(self) -> float:
        """The mean over all runs."""
        return fmean(one for block in self.blocks_ms for one in block)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """What a build found in its own interleaved run: native FP32 latency / this one, and the peak memory's share."""

    value: float
    ci95: tuple[float, float]
    memory_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of the images were right (or decided as the native model does).

    `per_image` is one character an image, 1 or 0, in the order of the images; `images` identifies them. Two shares with
    the same images are compared image by image.
    """

    right: int
    samples: int
    per_image: str = ""
    images: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """One engine: what it is, what its launches measured, and what the native model's measured in the same rounds."""

    backend: str
    backend_version: str = ""
    size_bytes: int | None = None
    batch: int = 1
    threads: int | None = None
    definition: str = ""
    """What was timed: latencies of different definitions are not compared."""
    load: float | None = None
    """The machine's load before it was measured, and on how many cores."""
    cores: int | None = None
    failure: str = ""
    """Why verification refused it or why it could not be measured; empty where all went well."""
    launches: tuple[Launch, ...] = ()
    native: tuple[Launch, ...] = ()
    speedup: Speedup | None = None
    accuracy: Share | None = None
    agreement: Share | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One variant with everything that a gate compares; the content of a baseline JSON file.

    `counts` are exact and the same on every machine: MACs, bytes, nodes, the share of MACs with Q/DQ.
    """

    name: str
    created: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    engines: tuple[EngineFacts, ...] = ()
    command: str = ""
    schema_version: int = SCHEMA_VERSION

    def engine(self, backend: str) -> EngineFacts | None:
        """Return the engine of one backend, or None."""
        return next((one for one in self.engines if one.backend == backend), None)


def differences(current: Snapshot, baseline: Snapshot, facts: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of the facts differ, each with both values; a fact that one side does not know is no difference."""
    found = []
    for name in facts:
        mine, theirs = _plain(current.machine.get(name)), _plain(baseline.machine.get(name))
        if mine is None or theirs is None or mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            both = sorted(key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key])
            found += [f"{key} {theirs[key]} -> {mine[key]}" for key in both]
        else:
            found.append(f"{name} {_flat(theirs)} -> {_flat(mine)}")
    return tuple(found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flat(value: Any) -> str:
    return " ".join(str(item) for item in value) or "none" if isinstance(value, list) else str(value)
