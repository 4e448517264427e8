"""The Pareto front of two values that are both better when they are lower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
NOISE = 0.03
"""Two costs this close, as a share, are one: measured again, they may change places."""


def front(
    items: Iterable[T], *, cost: Callable[[T], float], loss: Callable[[T], float], noise: float = NOISE
) -> tuple[T, ...]:
    """Return the items that no other beats in both, cheapest first; of costs within `noise` the lowest loss is kept.

    Within the noise is what costs at most so much more than the cheapest that is not accounted for. So each item that is left
    out has one in the front that loses no more and costs at most `noise` more, however many lie in a row.
    """
    kept: list[T] = []
    cheapest = 0.0
    for one in sorted(items, key=lambda item: (cost(item), loss(item))):
        if kept and loss(one) >= loss(kept[-1]) - 1e-9:
            continue
        if kept and cost(one) <= cheapest * (1 + noise):
            kept.pop()
        else:
            cheapest = cost(one)
        kept.append(one)
    return tuple(kept)
