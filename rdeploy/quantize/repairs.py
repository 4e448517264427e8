"""The repairs of a draft by their names: a judge, a draft and the best repair so far go in, ways to repair it come out.

They are fitted to images that do not judge (`Judge.others`); of several ways the judge takes the better one.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from rdeploy.quantize import qdq
from rdeploy.quantize.judge import Draft, Judge, Repair
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.repair import adaptive_rounding, analytic_bias, bias_correction, error_feedback


def _correct_biases(judge: Judge, draft: Draft, start: Repair) -> list[Repair]:
    return [_with_biases(judge, draft, _nearest(judge, draft))]


def _with_biases(judge: Judge, draft: Draft, weights: dict[str, qdq.QuantizedWeight]) -> Repair:
    """Return the repair that takes these integers and corrects every layer's bias for itself."""
    path = draft.graph.path
    if not draft.means:
        draft.means.append(
            bias_correction.observe_means(path, draft.ranges, judge.scheme, judge.others, keep_float=judge.keep_float)
        )
    layers = place(ir.load(path), judge.scheme, keep_float=judge.keep_float).weights
    return _shifted(bias_correction.shifts_with(layers, draft.means[0], weights), weights)


def _shifted(shifts: bias_correction.Shifts, weights: dict[str, qdq.QuantizedWeight]) -> Repair:
    def repair(model: ir.Model, placement: Placement) -> dict[str, qdq.QuantizedWeight]:
        bias_correction.apply(model, placement, shifts)
        return weights

    return repair


def _correct_biases_by_model(judge: Judge, draft: Draft, start: Repair) -> list[Repair]:
    nearest = _nearest(judge, draft)
    shifts = analytic_bias.observe_shifts(
        draft.graph.path, draft.ranges, judge.scheme, judge.others, nearest, keep_float=judge.keep_float
    )
    return [_shifted(shifts, nearest)]


def _correct_biases_in_order(judge: Judge, draft: Draft, start: Repair) -> list[Repair]:
    found = error_feedback.solve(
        draft.graph.path,
        draft.ranges,
        judge.scheme,
        judge.others,
        nearest=_nearest(judge, draft),
        keep_float=judge.keep_float,
    )
    return [lambda model, placement: error_feedback.apply(model, placement, found)]


def _nearest(judge: Judge, draft: Draft) -> dict[str, qdq.QuantizedWeight]:
    """Return the weights of a draft's graph rounded to nearest."""
    model = ir.load(draft.graph.path)
    return judge.nearest(draft.graph)(model, place(model, judge.scheme, keep_float=judge.keep_float))


def _feed_errors_back(judge: Judge, draft: Draft, start: Repair) -> list[Repair]:
    """Round with error feedback; biases are those found on the way, for what comes in, or each layer's own.

    What is large on a few images alone is not told by a mean: taking it back at every layer moves all the others.
    """
    found = error_feedback.solve(
        draft.graph.path, draft.ranges, judge.scheme, judge.others, keep_float=judge.keep_float
    )
    return [
        lambda model, placement: error_feedback.apply(model, placement, found),
        _with_biases(judge, draft, found.weights),
    ]


def _learn_rounding(judge: Judge, draft: Draft, start: Repair) -> list[Repair]:
    """Learn the rounding block by block from the best repair so far; biases are those learned, or each layer's own."""
    found = adaptive_rounding.solve(
        draft.graph.path, draft.ranges, judge.scheme, judge.others, start, keep_float=judge.keep_float
    )

    def repair(model: ir.Model, placement: Placement) -> dict[str, qdq.QuantizedWeight]:
        start(model, placement)
        return error_feedback.apply(model, placement, found)

    return [repair, _with_biases(judge, draft, found.weights)]


REPAIRS: dict[str, Callable[[Judge, Draft, Repair], list[Repair]]] = {
    "analytic_bias_correction": _correct_biases_by_model,
    "bias_correction": _correct_biases,
    "sequential_bias_correction": _correct_biases_in_order,
    "error_feedback": _feed_errors_back,
    "adaptive_rounding": _learn_rounding,
}
