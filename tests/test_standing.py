"""How a search stands: the best so far, and how long it may take."""

import math
import runpy
from pathlib import Path

from rdeploy.search import Budget
from rdeploy.standing import Watcher

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
evidence = POINTS["evidence"]
NATIVE, SMALL, SMALLER = evidence(224, 0, 8), evidence(160, 1, 4), evidence(112, 9, 2)


def told(rounds, *, deadline=math.inf, budget=None):
    """Return what is told of rounds, each (seconds, measured, variants that are left)."""
    seconds, found = iter([at for at, _, _ in rounds]), []
    watcher = Watcher(found.append, budget or Budget(max_drop=2.0), deadline=deadline, clock=lambda: next(seconds))
    for _, measured, variants in rounds:
        watcher.tell(measured, points=2 * variants, variants=variants)
    return found


def test_the_best_so_far_is_what_would_be_picked_now():
    first, second, last = told([(0, [], 9), (1, [SMALLER], 8), (2, [NATIVE, SMALL, SMALLER], 6)])

    assert (first.best, second.best, last.best) == (None, None, SMALL)
    assert (last.left, len(last.measured)) == (12, 3)


def test_the_time_that_is_left_goes_by_what_each_variant_took_so_far():
    first, second, third = told([(100, [], 9), (120, [NATIVE, SMALL], 6), (130, [NATIVE, SMALL, SMALLER], 3)])

    assert (first.seconds_left, second.seconds_left, third.seconds_left) == (None, 60, 30)


def test_what_an_earlier_process_measured_took_none_of_this_ones_time():
    assert [one.seconds_left for one in told([(0, [NATIVE], 8), (20, [NATIVE, SMALL], 5)])] == [None, 100]


def test_it_is_never_more_than_the_time_budget_leaves():
    assert [one.seconds_left for one in told([(0, [], 8), (20, [NATIVE], 7), (50, [NATIVE], 7)], deadline=40)] == [
        40,
        20,
        0,
    ]


def test_where_nobody_watches_nothing_is_told():
    Watcher(None, Budget(), deadline=0.0, clock=lambda: 1 / 0).tell([NATIVE], points=1, variants=1)
