"""How a search stands, for whoever watches it: what was measured goes in; the best so far and how long it may take come out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rdeploy import choosing
from rdeploy.search import Budget, Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What was measured so far, and how many points are left that could still enter the front."""

    measured: tuple[Evidence, ...]
    left: int
    best: Evidence | None
    """What would be picked now; None where nothing that was measured satisfies the budget."""
    seconds_left: float | None
    """At most so long, by the time that each variant took so far; None before anything was measured."""


Watch = Callable[[Standing], None]


class Watcher:
    """Tells a search's standing after each round; the time that each variant takes is counted from the first round on."""

    def __init__(
        self, watch: Watch | None, budget: Budget, *, deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watch, self._budget, self._deadline, self._clock = watch, budget, deadline, clock
        self._began: tuple[float, int] | None = None

    def tell(self, measured: Sequence[Evidence], *, points: int, variants: int) -> None:
        """Tell what was measured, and how many points of how many variants are left."""
        if self._watch is None:
            return
        best = choosing.choose(measured, self._budget).pick
        seconds = self._seconds_left(len({one.variant for one in measured}), variants)
        self._watch(Standing(measured=tuple(measured), left=points, best=best, seconds_left=seconds))

    def _seconds_left(self, done: int, variants: int) -> float | None:
        now = self._clock()
        if self._began is None:
            self._began = now, done
        began, before = self._began
        remaining = max(0.0, self._deadline - now)
        if done == before:
            return remaining if math.isfinite(remaining) else None
        return min(remaining, (now - began) / (done - before) * variants)
