"""A run's bundles and what its search wrote down go in; the rows come out, with the roles that the search gave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rdeploy.report import points as rows
from rdeploy.report.points import NATIVE, Bundle, Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `rdeploy optimize` says in `outcome.json`; without a pick nothing satisfies the budget, and `reason` says why."""

    pick: str | None
    reason: str
    front: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Bundles in the same folder that this search did not write, such as those of an earlier front: they are not shown."""


def points(bundles: Sequence[Bundle], outcome: Outcome | None) -> tuple[Point, ...]:
    """Return the points of a run with the roles that its search gave them; without a search those that `points.points` gives."""
    if outcome is None or not bundles:
        return rows.points(bundles)
    front = {_called(bundles, name) for name in outcome.front}
    pick = None if outcome.pick is None else _called(bundles, outcome.pick)
    return rows.marked(rows.rows(bundles), on_front=front, pick=pick)


def _called(bundles: Sequence[Bundle], point: str) -> str:
    """Return what a report calls a point of the search: the native model's are `native@openvino` and not `r224-fp32@openvino`."""
    variant, _, way = point.partition("@")
    native = (bundles[0].manifest.get("baseline") or {}).get("id")
    return f"{NATIVE}@{way}" if variant == native else point
