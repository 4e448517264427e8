"""Measured points and a budget go in; the pick, the second best and the reason come out, or by how much nothing satisfies it.

Labels of a few images say little about a loss of a point. Where decisions were counted as well, what a changed one costs is
fitted over the variants (`relation`), and the narrower of the two intervals decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rdeploy import relation
from rdeploy.search import Budget, Evidence, Interval, points_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The pick and the second best, and why; without a pick nothing satisfies the budget, and `reason` says by how much."""

    pick: Evidence | None
    second: Evidence | None
    reason: str


def choose(measured: Sequence[Evidence], budget: Budget, *, everything: Sequence[Evidence] | None = None) -> Choice:
    """Return the best measured point within the budget, by the upper ends of the intervals of its loss and its latency.

    A point whose interval crosses a limit is taken only where none is surely inside, and the reason says so.

    Args:
        everything: all points that were measured, where `measured` are the finalists.
    """
    everything = measured if everything is None else everything
    points = [_Judged(one, *(relation.narrower(one, everything) or (one.drop, None))) for one in measured]
    goal = _goal(budget.objective)
    affordable = [one for one in points if not _excess(one, budget)]
    if not affordable:
        return Choice(pick=None, second=None, reason=_unmet(points, budget))
    sure = [one for one in affordable if not _doubts(one, budget)]
    ranked = sorted(sure or affordable, key=goal)
    pick, second = ranked[0], next(iter(ranked[1:]), None)
    if second is None:
        second = min((one for one in affordable if one is not pick), key=goal, default=None)
    reason = "; ".join([_reason(pick, budget, of=len(everything)), *_doubts(pick, budget)])
    return Choice(pick=pick.point, second=second.point if second else None, reason=reason)


@dataclass(frozen=True, slots=True)
class _Judged:
    """A point with the loss that decides: what its labels say, or, where that is narrower, what `by` expects."""

    point: Evidence
    loss: Interval
    by: relation.Relation | None


def _goal(objective: str) -> Callable[[_Judged], tuple[float, float]]:
    values: Mapping[str, Callable[[Evidence], float]] = {
        "latency": lambda one: one.latency_ms.value,
        "throughput": lambda one: -one.throughput_ips,
        "memory": lambda one: float(one.memory_bytes or math.inf),
        "size": lambda one: float(one.size_bytes),
    }
    return lambda one: (values[objective](one.point), one.loss.value)


def _excess(judged: _Judged, budget: Budget) -> dict[str, float]:
    """Return by how much a point exceeds each limit, in the limit's unit."""
    one = judged.point
    memory_mb = None if one.memory_bytes is None else one.memory_bytes / 1e6
    values = (
        ("drop", judged.loss.value, budget.max_drop),
        ("latency", one.latency_ms.value, budget.max_latency_ms),
        ("memory", memory_mb, budget.max_memory_mb),
        ("size", one.size_bytes / 1e6, budget.max_size_mb),
    )
    over = {name: value - limit for name, value, limit in values if value is not None and limit is not None}
    return {name: excess for name, excess in over.items() if excess > 0}


def _doubts(judged: _Judged, budget: Budget) -> list[str]:
    """Return why it is not sure that a point within the budget will stay there, a sentence for each limit."""
    one, found = judged.point, []
    if budget.max_drop is not None and judged.loss.high > budget.max_drop:
        found.append(
            f"with these images it is not sure that the loss stays under {budget.max_drop:g}: give more of them"
        )
    if budget.max_latency_ms is not None and one.latency_ms.high > budget.max_latency_ms:
        took = f"[{one.latency_ms.low:.2f}, {one.latency_ms.high:.2f}] ms"
        found.append(
            f"at {took} it is not sure that it stays under {budget.max_latency_ms:g} ms: measure on a quieter machine"
        )
    if budget.max_memory_mb is not None and one.memory_bytes is None:
        found.append("its memory could not be measured here")
    return found


_UNITS = {"drop": "points", "latency": "ms", "memory": "MB", "size": "MB"}
_OPTIONS = {
    "drop": "--max-drop",
    "latency": "--max-latency-ms",
    "memory": "--max-memory-mb",
    "size": "--max-size-mb",
}
_REMEDIES = {
    "drop": "fine-tune the lower resolution, or allow a larger drop",
    "latency": "allow a larger drop, take a faster target, or a smaller network",
    "memory": "take a smaller batch or another runtime",
    "size": "take a smaller network",
}


def _unmet(points: Sequence[_Judged], budget: Budget) -> str:
    """Say that no point satisfies the budget, by how much the nearest misses it, and what would help."""
    if not points:
        return "no point could be measured"
    limits = {"drop": budget.max_drop, "latency": budget.max_latency_ms}
    limits |= {"memory": budget.max_memory_mb, "size": budget.max_size_mb}

    def miss(one: _Judged) -> float:
        return sum(over / max(limits[name] or 0.0, 1e-9) for name, over in _excess(one, budget).items())

    nearest = min(points, key=miss)
    over = _excess(nearest, budget)
    amounts = ", ".join(f"{excess:.2f} {_UNITS[name]} too much {name}" for name, excess in over.items())
    admits = " ".join(f"{_OPTIONS[name]} {_up((limits[name] or 0.0) + excess)}" for name, excess in over.items())
    advice = "; ".join(_REMEDIES[name] for name in over)
    text = f"no point satisfies the budget: the nearest, {nearest.point.point.id}, has {amounts}; it takes {admits}, or: {advice}"
    least = min(points, key=lambda one: one.point.latency_ms.value)
    if "latency" in over and least is not nearest:
        loses = f"{least.point.latency_ms.value:.2f} ms, and loses {points_text(least.loss)}"
        text += f"; the fastest of all, {least.point.point.id}, takes {loses}"
    return text


def _up(value: float) -> str:
    """Return a limit that admits the value, rounded up to two digits after the point."""
    return f"{math.ceil(value * 100) / 100:g}"


def _reason(judged: _Judged, budget: Budget, *, of: int) -> str:
    pick = judged.point
    words = {
        "latency": f"lowest latency, {pick.latency_ms.value:.2f} ms",
        "throughput": f"highest throughput, {pick.throughput_ips:.0f} images/s at batch {pick.point.batch}",
        "memory": f"lowest peak memory, {(pick.memory_bytes or 0) / 1e6:.0f} MB",
        "size": f"smallest engine, {pick.size_bytes / 1e6:.1f} MB",
    }[budget.objective]
    reason = f"{words}, of the {of} points measured; it loses {points_text(pick.drop)}"
    if judged.by is not None and pick.changed is not None:
        reason += f"; {_expected(judged.loss, pick.changed, judged.by)}"
    return reason


def _expected(loss: Interval, changed: Interval, by: relation.Relation) -> str:
    slope = f"{by.slope.value:.2f} [{by.slope.low:.2f}, {by.slope.high:.2f}]"
    return (
        f"labels are few: {points_text(loss)} are expected of its {changed.value:.1f} % of changed decisions, at {slope} points "
        f"lost for each, fitted on {by.variants} variants"
    )
