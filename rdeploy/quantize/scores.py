"""Queries x keys and the patch embedding in integers, where a runtime is faster so: a draft goes in, drafts of them come out.

A recipe leaves attention in float, which is what keeps a transformer accurate. OpenVINO computes queries x keys in integers
where both are signed and have no zero point, and converts them back to float otherwise. So that is tried last, on the graph
that was chosen, with its weights repaired anew, and kept where it costs little.
"""

from __future__ import annotations

from dataclasses import replace

from rdeploy import plugins
from rdeploy.quantize import calibrators
from rdeploy.quantize.judge import Draft, Judge
from rdeploy.quantize.ranges import Signed, find_ranges
from rdeploy.types import QuantOptions, QuantScheme

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


def drafts(judge: Judge, draft: Draft, options: QuantOptions) -> list[Draft]:
    """Return the draft with queries and keys in integers, once for each calibrator of theirs; `judge` is of the wider scheme.

    There are none where the graph multiplies no queries and keys.
    """
    graph, placed = draft.graph, judge.placed(draft.graph)
    auto = options.calibrator == "auto"
    found = []
    for name in (_CALIBRATORS if auto else (options.calibrator,)) if placed.factors else ():
        plugin, given = calibrators.find(name), {} if auto else dict(options.calibrator_options)
        settings = plugins.make_options(plugin.Options, given, where=f"calibrator {name}")
        factors = {tensor: graph.histograms[tensor] for tensor in placed.factors}
        others = {t: graph.histograms[t] for t in placed.reads if t not in draft.ranges and t not in factors}
        ranges = dict(draft.ranges)
        for seen, signed in ((others, False), (factors, True)):
            spans = find_ranges(
                seen, calibrator=name, options=settings, symmetric=signed or judge.scheme.activations == "int8"
            )
            ranges |= {t: Signed(*span) for t, span in spans.items()} if signed else spans
        made = replace(draft, ranges=ranges, means=[])
        found.append(replace(made, sqnr_db=judge.score(made, judge.nearest(graph))))
    return found
