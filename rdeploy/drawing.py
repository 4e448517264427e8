"""Points drawn from what cannot be enumerated are measured like any other; the sampler learns what they came to."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rdeploy import rounds, sampling, variations
from rdeploy.errors import Unsupported
from rdeploy.rounds import Search
from rdeploy.search import Evidence, Point
from rdeploy.types import QuantOptions, Variant

log = logging.getLogger(__name__)


def measure_samples(one: Search, samples: int, quant: QuantOptions | None) -> None:
    """Draw points until so many were answered in this run's folder, a few at a time, and measure each.

    Args:
        quant: how INT8 is made; None where it is not searched.

    Raises:
        MissingDependency: Optuna is not installed.
        Unsupported: there is nothing that cannot be enumerated.
    """
    judged = one.store.candidates().values()
    places = sorted((c.variant for c, out in judged if not out and c.variant.precision == "fp32"), key=lambda v: v.id)
    space = variations.space_of(one.this, places, quant)
    sampler = sampling.Sampler(one.store.path.parent, space.dimensions, seed=one.this.request.seed)
    while (left := samples - sampler.told) > 0 and not one.late():
        drawn = sampler.ask(min(left, max(one.at_once, one.crew.size)))
        variants = {number: _drawn(one, space, choices) for number, choices in drawn}
        points = [
            Point(variant=variant, backend=backend, batch=batch)
            for variant in dict.fromkeys(filter(None, variants.values()))
            for backend, batch in one.ways
        ]
        taken = [point for point in points if one.store.claim(point.id)]
        one.crew.begin(point.variant for point in taken)
        rounds.measure(one, taken)
        rounds.await_others(one, points)
        measured = one.store.evidence()
        for number, variant in variants.items():
            sampler.tell(number, _best(measured, variant))
        one.watcher.tell(measured, points=left - len(drawn), variants=left - len(drawn))


def _drawn(one: Search, space: variations.Space, choices: sampling.Choices) -> Variant | None:
    try:
        return variations.variant_of(one.this, space, choices)
    except Unsupported as error:
        log.info("%s: %s", choices, error)
        return None


def _best(measured: Sequence[Evidence], variant: Variant | None) -> tuple[float, float] | None:
    """Return the latency for an image and the drop of the variant's fastest engine, None where none was measured."""
    mine = [one for one in measured if variant is not None and one.point.variant.id == variant.id]
    fastest = min(mine, key=lambda one: one.ms_per_image, default=None)
    return None if fastest is None else (fastest.ms_per_image, fastest.drop.value)
