"""Time an engine honestly: warm up until steady, keep raw samples, and say faster, slower or inconclusive."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from rdeploy import modes
from rdeploy.errors import ConfigError, InvariantError
from rdeploy.measured import Measurement
from rdeploy.types import Timing

PERCENTILES = (("p90_ms", 90.0, 64), ("p95_ms", 95.0, 130), ("p99_ms", 99.0, 662))
"""Name, percentile, and the fewest samples that support it."""

_WINDOW_S = 0.05
_WINDOW_RUNS = 3
_WINDOWS = 3
_STEADY = 0.025
_DRIFT = 0.05
_SPREAD = 0.1
_KNEE = 0.95
_BLOCK_MS = 20.0
_BLOCK_ALONE_MS = 200.0
_MIN_BLOCKS = 16
_MIN_PAIRS = 6
"""Fewer pairs cannot carry a 95 % statement about a median: with 5, even their whole range holds it with 94 % only."""
_RESAMPLES = 4000
_PROCESS_EFFECT = 0.01
"""Two processes with the same engine differ by this much for as long as they live (memory layout, thread placement;
Mytkowicz et al., ASPLOS 2009): no number of runs inside one process shows it, so a smaller difference is no verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """How the warm-up went: `stable` when the last windows' medians agreed before the time was up."""

    runs: int
    stable: bool
    median_ms: float


def warm_up(run: Callable[[], object], *, max_s: float, clock: Callable[[], int] = time.perf_counter_ns) -> WarmUp:
    """Call `run` until the medians of three successive windows (at least 50 ms and 3 runs each) agree within 2.5 %.

    Ends unstable after `max_s` seconds. `clock` returns nanoseconds.
    """
    start = clock()
    windows: list[float] = []
    runs = 0
    while True:
        window = _window(run, end_ns=start + int(max_s * 1e9), clock=clock)
        runs += len(window)
        windows.append(median(window) / 1e6)
        last = windows[-_WINDOWS:]
        if len(last) == _WINDOWS and max(last) <= min(last) * (1 + _STEADY):
            return WarmUp(runs=runs, stable=True, median_ms=last[-1])
        if clock() - start >= max_s * 1e9:
            return WarmUp(runs=runs, stable=False, median_ms=last[-1])


def timed_runs(
    run: Callable[[], object], count: int, *, clock: Callable[[], int] = time.perf_counter_ns
) -> list[float]:
    """Return the milliseconds of `count` synchronous calls, the garbage collector held off meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        marks = [clock()]
        for _ in range(count):
            run()
            marks.append(clock())
    finally:
        if enabled:
            gc.enable()
    return [(after - before) / 1e6 for before, after in itertools.pairwise(marks)]


def paced_runs(
    run: Callable[[], object],
    count: int,
    *,
    fps: float,
    clock: Callable[[], int] = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[float], int]:
    """Call `run` for `count` frames of a camera; return the milliseconds of each call, and how many frames were late.

    The process sleeps until a frame is there, and a call begins when it woke up. Late is an answer after the next
    frame; the frames that came meanwhile are dropped, as a camera's are.
    """
    period = 1e9 / fps
    latencies, late, due = [], 0, clock() + period
    for _ in range(count):
        if (wait := due - clock()) > 0:
            sleep(wait / 1e9)
        start = clock()
        run()
        end = clock()
        latencies.append((end - start) / 1e6)
        late += end > due + period
        due += period * max(1, math.ceil((end - due) / period))
    return latencies, late


def runs_per_block(latency_ms: float, timing: Timing, *, alone: bool = False) -> int:
    """Return how many runs make a block: about 20 ms, so that asking for it costs nothing, but at least 16 blocks.

    An engine that is measured `alone` takes turns with nobody: 200 ms, for the runtime's threads fall asleep between blocks.
    """
    wanted = math.ceil((_BLOCK_ALONE_MS if alone else _BLOCK_MS) / max(latency_ms, 1e-3))
    return max(1, min(wanted, timing.min_samples // _MIN_BLOCKS, timing.max_samples // _MIN_BLOCKS))


def summary(latencies_ms: Sequence[float], *, batch: int = 1) -> dict[str, Any]:
    """Derive what is reported from raw latencies: p50/p90/p95/p99/mean (ms), cov, images a second, drift, two modes.

    A percentile that the number of samples cannot support is None, and `reasons` says why under its name. `cov` is the
    sample standard deviation over the mean; `drift` compares the medians of the last and the first third; `modes` is
    None where one speed explains the samples; `warnings` says in words what makes them doubtful.

    Raises:
        InvariantError: there are no samples.
    """
    if not len(latencies_ms):
        raise InvariantError("a measurement without samples cannot be summarised")
    samples = np.asarray(latencies_ms, dtype=np.float64)
    count, mean = len(samples), float(samples.mean())
    values: dict[str, Any] = {"samples": count, "p50_ms": float(np.median(samples))}
    reasons: dict[str, str] = {}
    for name, percentile, needed in PERCENTILES:
        values[name] = float(np.percentile(samples, percentile)) if count >= needed else None
        if count < needed:
            reasons[name] = f"needs at least {needed} samples, there are {count}"
    values["mean_ms"] = mean
    values["cov"] = float(samples.std(ddof=1) / mean) if count > 1 and mean > 0 else None
    values["throughput_ips"] = batch * 1000.0 / mean if mean > 0 else None
    values["drift"] = drift(latencies_ms)
    values["modes"] = modes.find(latencies_ms)
    values["warnings"] = _warnings(values)
    values["reasons"] = reasons
    return values


def _warnings(values: dict[str, Any]) -> tuple[str, ...]:
    found = []
    if values["drift"] is not None and abs(values["drift"]) > _DRIFT:
        found.append(f"the latency drifted by {values['drift']:+.0%} while it was measured")
    if two := values["modes"]:
        share = f"{two.high_share:.0%} of the runs took the longer one"
        found.append(f"two speeds, {two.low_ms:.3g} and {two.high_ms:.3g} ms, {share}: the median is one of the two")
    if values["cov"] is not None and values["cov"] > _SPREAD:
        found.append(f"the latencies vary by {values['cov']:.0%} (standard deviation over mean)")
    return tuple(found)


def check_comparable(first: Measurement, second: Measurement) -> None:
    """Check that two measurements are of the same thing.

    Raises:
        ConfigError: their definitions of latency differ.
    """
    if first.definition != second.definition:
        raise ConfigError(
            f"two definitions of latency cannot be compared: {first.definition!r} and {second.definition!r}; "
            "measure both in the same way"
        )


def knee(points: Sequence[tuple[int, float]]) -> int | None:
    """Return the smallest batch that gets 95 % of the best throughput; (batch, images a second) each; None under 2."""
    best = max((rate for _, rate in points), default=0.0)
    enough = [batch for batch, rate in points if rate >= _KNEE * best]
    return min(enough) if len(points) > 1 else None


def drift(latencies_ms: Sequence[float]) -> float | None:
    """Return by which fraction the last third's median lies above the first third's; None under 9 samples."""
    third = len(latencies_ms) // 3
    if third < 3:
        return None
    first, last = median(latencies_ms[:third]), median(latencies_ms[-third:])
    return last / first - 1.0 if first > 0 else None


def is_steady(latencies_ms: Sequence[float]) -> bool:
    """Tell whether the latencies stayed where they began, within 5 %."""
    found = drift(latencies_ms)
    return found is None or abs(found) <= _DRIFT


def speedup(
    baseline_blocks: Sequence[Sequence[float]], variant_blocks: Sequence[Sequence[float]], *, seed: int
) -> tuple[float, tuple[float, float], str]:
    """Return baseline / variant latency, its 95 % interval, and "faster", "slower" or "inconclusive".

    Block i of both was measured in the same round, so the blocks are resampled in pairs: what disturbed the machine in
    a round disturbed both. The ratio is that of the medians of the block medians; its interval is SciPy's percentile
    bootstrap (BCa under-covers for medians). Blocks beyond the shorter run have no partner and are left out. With fewer
    than 6 pairs the interval is the range of the pairs' own ratios and the verdict is always "inconclusive"; so it is
    where the interval includes 1.0 or comes within 1 % of it, which two processes with the same engine differ by.

    Raises:
        InvariantError: one side has no blocks.
    """
    pairs = min(len(baseline_blocks), len(variant_blocks))
    if not pairs:
        raise InvariantError("a speed-up needs at least one block of each side")
    baseline = np.array([median(block) for block in baseline_blocks[:pairs]])
    variant = np.array([median(block) for block in variant_blocks[:pairs]])
    ratios = baseline / variant
    ratio = float(np.median(baseline) / np.median(variant))
    if pairs < _MIN_PAIRS:
        return ratio, (float(ratios.min()), float(ratios.max())), "inconclusive"
    if np.ptp(baseline) == 0.0 and np.ptp(variant) == 0.0:
        return ratio, (ratio, ratio), _verdict(ratio, ratio)
    low, high = _bootstrap_interval(baseline, variant, seed=seed)
    return ratio, (low, high), _verdict(low, high)


def _window(run: Callable[[], object], *, end_ns: int, clock: Callable[[], int]) -> list[int]:
    times: list[int] = []
    start = before = clock()
    while len(times) < _WINDOW_RUNS or before - start < _WINDOW_S * 1e9:
        run()
        after = clock()
        times.append(after - before)
        before = after
        if after >= end_ns:
            break
    return times


def _bootstrap_interval(baseline: Any, variant: Any, *, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def ratio_of_medians(first: Any, second: Any, axis: int = -1) -> Any:
        return np.median(first, axis=axis) / np.median(second, axis=axis)

    found = bootstrap(
        (baseline, variant),
        ratio_of_medians,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _verdict(low: float, high: float) -> str:
    if low > 1.0 + _PROCESS_EFFECT:
        return "faster"
    return "slower" if high < 1.0 - _PROCESS_EFFECT else "inconclusive"
