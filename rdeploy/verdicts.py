"""The interval of a change and its budget go in, a verdict comes out: pass, regression, improvement, inconclusive.

A metric regressed only if its whole interval lies beyond the budget, and passes only if its whole interval lies within;
anything else is inconclusive. `worse` is the logarithm of a ratio, or a difference of shares, positive where the metric
got worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rdeploy import intervals
from rdeploy.evidence import HIGHER_IS_BETTER, SHARES, Evidence
from rdeploy.intervals import Interval

PASS, REGRESSION, IMPROVEMENT = "pass", "regression", "improvement"
INCONCLUSIVE, NOT_COMPARABLE = "inconclusive", "not comparable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The verdict on one metric, of one engine or of the whole variant (`backend` None).

    `change` and `interval` are fractions of the baseline's value, for shares the difference itself; positive is more,
    which is worse or better as the metric has it. `needed`: how many more launches or images would settle it.
    """

    metric: str
    verdict: str
    backend: str | None = None
    baseline: float | None = None
    current: float | None = None
    change: float | None = None
    interval: Interval | None = None
    budget: float | None = None
    basis: str = ""
    reason: str = ""
    needed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What `rdeploy check` found.

    `notes`: how machine and software differ. `launches`: per backend, how many were measured for this check.
    `update`: the command that makes the current variant the baseline.
    """

    verdict: str
    current: str
    baseline: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    confidence: float = 0.99
    launches: Mapping[str, int] = field(default_factory=dict)
    update: str = ""

    @property
    def exit_code(self) -> int:
        """0: pass or improvement, 1: regression, 4: inconclusive."""
        return {REGRESSION: 1, INCONCLUSIVE: 4}.get(self.verdict, 0)


def overall(findings: Sequence[Finding]) -> str:
    """Return the verdict on the whole: a regression outweighs what is inconclusive, and that outweighs the rest."""
    found = {one.verdict for one in findings}
    for name in (REGRESSION, INCONCLUSIVE, IMPROVEMENT):
        if name in found:
            return name
    return PASS if PASS in found else INCONCLUSIVE


def judge(metric: str, backend: str | None, known: Evidence, budget: float, *, alpha: float) -> Finding:
    """Lay the budget against the interval of the change."""
    low, high = known.worse.interval(alpha)
    worst, best = _bounds(metric, budget)
    result = decide((low, high), worst, best)
    reason, needed = "", None
    if result == INCONCLUSIVE and known.launches:
        distance = abs(known.worse.mean - worst)
        total = intervals.launches_needed(known.worse, launches=known.launches, distance=distance, alpha=alpha)
        needed = None if total is None else max(1, total - known.launches)
        reason = unsettled("launches", needed)
    elif result == INCONCLUSIVE:
        reason = "--rerun-baseline measures both sides side by side, in as many launches as it takes"
    change, interval = _as_change(metric, known.worse.mean), tuple(_as_change(metric, x) for x in (low, high))
    return Finding(
        metric=metric,
        backend=backend,
        verdict=result,
        baseline=known.baseline,
        current=known.current,
        change=change,
        interval=(min(interval), max(interval)),
        budget=budget,
        basis=known.basis,
        reason=reason,
        needed=needed,
    )


def decide(worse: Interval, worst: float, best: float) -> str:
    """Return the verdict on an interval: `worst` is how much worse is too much, `best` how much better is an improvement."""
    low, high = worse
    if low > worst:
        return REGRESSION
    if high < -best:
        return IMPROVEMENT
    return PASS if high <= worst else INCONCLUSIVE


def _bounds(metric: str, budget: float) -> tuple[float, float]:
    """Return how much worse is too much, and how much better is an improvement, as `worse` counts."""
    if metric in SHARES:
        return budget, budget
    up, down = math.log1p(budget), -math.log1p(-budget) if budget < 1 else math.inf
    return (down, up) if metric in HIGHER_IS_BETTER else (up, down)


def _as_change(metric: str, worse: float) -> float:
    return -worse if metric in SHARES else math.expm1(worse * sign(metric))


def sign(metric: str) -> int:
    """Return 1 where more is worse, -1 where more is better."""
    return -1 if metric in HIGHER_IS_BETTER else 1


def unsettled(unit: str, needed: int | None) -> str:
    """Say what it would take to settle what is inconclusive."""
    if needed is None:
        return f"the change is too close to the budget for any sensible number of {unit}"
    return f"about {needed} more {unit} would settle it"
