"""Queries x keys and the patch embedding in integers, where a runtime is faster so: what is tried, and what it may cost.

A recipe leaves attention in float, which is what keeps a transformer accurate. OpenVINO computes queries x keys in integers
where both are signed and have no zero point, and converts them back to float otherwise. So that is tried last, on the graph
that was chosen, with its weights repaired anew, and kept where it costs little.
"""

from __future__ import annotations

from dataclasses import replace

from rdeploy.types import QuantScheme

COST_DB, HOPELESS_DB = 1.5, 3.0
"""What they may seem to cost, and what no repair of the weights brings back. What they are compared with was the best of dozens
on the same images: on others a ViT-S/14 loses 0.1 dB where these say 1.2."""
_CALIBRATORS = ("minmax", "mean_extremes", "mse")
"""A softmax looks at the extremes of what it gets: the best of these is not always that of the other tensors."""


def widest(scheme: QuantScheme) -> QuantScheme:
    """Return a scheme with all that may be tried on it."""
    if not scheme.integer_attention or scheme.products != "none":
        return scheme
    return replace(scheme, products="scores", patches=True)


def calibrators(chosen: str, asked: str) -> list[str]:
    """Return what to try: the chosen calibrator with each of theirs for queries and keys, or the one that was asked for."""
    return [chosen if name == chosen else f"{chosen}+{name}" for name in _CALIBRATORS] if asked == "auto" else [asked]
