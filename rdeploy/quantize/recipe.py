"""Quantize one FP32 graph for one runtime: graph, scheme and calibration images go in, an INT8 graph with its facts comes out.

A straight line: equalize the channels of a copy of the graph and watch the activations of both (`calibrate`, once for every
scheme), try the calibrators and keep the ranges whose graph is closest to FP32 at the output, then try the repairs of the
weights and keep the best. Every step that is kept has been measured on calibration images that it was not fitted to; what
each gained is in `Quantization.recipe`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rdeploy import plugins
from rdeploy.errors import StageError, Unsupported
from rdeploy.quantize import calibrators, check, families, gradients, qdq, rounding
from rdeploy.quantize.histogram import Histogram, settled
from rdeploy.quantize.judge import FITTED, Draft, Images, Judge, Repair, Watched, Weights, evenly
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.ranges import find_ranges, observe
from rdeploy.quantize.repair import (
    adaptive_rounding,
    analytic_bias,
    bias_correction,
    equalization,
    error_feedback,
    smoothing,
)
from rdeploy.results import Quantization
from rdeploy.types import QuantOptions, QuantScheme

log = logging.getLogger(__name__)

_PRICES_DB = {"smoothed": 0.5}
"""What a change of the graph has to gain beyond nothing: smoothing costs operators at run time."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The exported graph and, where channels could be equalized, the equalized one; `recipe` says what to try on them."""

    recipe: str
    graphs: tuple[Watched, ...]
    said: tuple[str, ...]


@dataclass(slots=True)
class Pinned:
    """What the first quantization chose and later ones keep: they differ by the layers that are left in float, no more."""

    calibrator: str = ""
    graph: str = ""
    said: tuple[str, ...] = ()


def observe_for(path: Path, schemes: Sequence[QuantScheme], images: Images) -> dict[str, Histogram]:
    """Watch, in one pass over the images, every tensor that any of the schemes quantizes."""
    graph = ir.load(path)
    tensors: set[str] = set()
    for scheme in schemes:
        tensors |= set(place(graph, scheme).reads)
    if not tensors:
        raise Unsupported(
            "there is nothing to quantize: the graph holds no convolution or Linear layer with constant weights",
            stage="quantize",
        )
    return observe(path, sorted(tensors), images)


def calibrate(
    path: Path, folder: Path, *, schemes: Sequence[QuantScheme], images: Images, recipe: str = families.AUTO
) -> Calibration:
    """Watch the graph at `path` and its equalized form, which is written to `folder`; both serve all the schemes.

    Raises:
        ConfigError: there is no recipe of that name.
        StageError: an activation is not finite.
        Unsupported: there is nothing to quantize.
    """
    name, steps = families.find(recipe, ir.load(path).graph)
    graphs = [_watch("exported", path, schemes, images)]
    said = [f"recipe {name}", _enough(settled(graphs[0].histograms.values()), len(images))]
    if steps.equalize and (
        scaled := equalization.equalize(path, folder / "equalized.onnx", schemes, evenly(images, FITTED))
    ):
        graphs.append(_watch("equalized", folder / "equalized.onnx", schemes, images))
        said.append(f"{scaled} groups of channels can be equalized")
    if steps.smooth and (smoothed := smoothing.smooth(path, folder / "smoothed.onnx", schemes, evenly(images, FITTED))):
        graphs.append(_watch("smoothed", folder / "smoothed.onnx", schemes, images))
        said.append(f"{smoothed} tensors can be smoothed")
    return Calibration(name, tuple(graphs), tuple(said))


def _watch(name: str, path: Path, schemes: Sequence[QuantScheme], images: Images) -> Watched:
    return Watched(name, path, observe_for(path, schemes, images))


def _enough(needed: int, images: int) -> str:
    """Say whether the number of images was enough: a range that moved in the last quarter may move again."""
    if needed > 0.75 * images:
        return f"ranges still moved at image {needed} of {images}: give more images"
    return f"ranges stopped moving after {needed} of {images} images"


def quantize(
    calibration: Calibration,
    out: Path,
    *,
    scheme: QuantScheme,
    images: Images,
    options: QuantOptions,
    weights: Weights | None = None,
    pinned: Pinned | None = None,
) -> Quantization:
    """Write the INT8 form of the calibrated graph to `out`; return what was done and what it gained.

    `weights` keeps quantized weights from one scheme of a graph to the next, `pinned` calibrator and graph of one scheme.

    Raises:
        StageError: an activation or the quantized output is not finite.
        InvariantError: the graph that was written is not legal for the scheme.
    """
    steps = families.RECIPES[calibration.recipe]
    judge = Judge(
        calibration.graphs[0].path, out, scheme, images, {} if weights is None else weights, options.keep_float
    )
    if pinned is not None and pinned.graph:
        graph = next(graph for graph in calibration.graphs if graph.name == pinned.graph)
        best, said = _draft(judge, graph, pinned.calibrator, options), list(pinned.said)
    else:
        best, said = _best_draft(judge, calibration, steps, options)
    if best.sqnr_db == -math.inf:
        raise StageError("quantize", "the INT8 graph gives NaN or infinity on calibration images, whatever its ranges")
    if pinned is not None:
        pinned.calibrator, pinned.graph, pinned.said = best.calibrator, best.graph.name, tuple(said)
    repair, repaired = _repair(judge, best, steps.repairs)
    placement = judge.write(best, repair)
    check.check_legal(out, scheme)
    return Quantization(
        calibrator=best.calibrator,
        samples=len(images),
        images_sha256="",
        skipped=tuple(placement.skipped),
        recipe=(*said, *repaired),
        coverage=check.coverage(out),
    )


def _best_draft(
    judge: Judge, calibration: Calibration, steps: families.Recipe, options: QuantOptions
) -> tuple[Draft, list[str]]:
    """Try the calibrators on the graph that was changed most, then the best of them on the others; say what each gained."""
    tried = steps.calibrators if options.calibrator == "auto" else (options.calibrator,)
    drafts = [_draft(judge, calibration.graphs[-1], name, options) for name in tried]
    best = max(drafts, key=lambda draft: draft.sqnr_db)
    scores = _scores(drafts, best)
    simpler = [_draft(judge, graph, best.calibrator, options) for graph in calibration.graphs[:-1]]
    best, changed = _best_graph([*simpler, best])
    left_out = dict.fromkeys(line for graph in calibration.graphs for line in graph.said)
    return best, [*calibration.said, scores, *left_out, *changed]


def _draft(judge: Judge, graph: Watched, name: str, options: QuantOptions) -> Draft:
    """Find the ranges of one calibrator and score them, with weights rounded to nearest."""
    placement = judge.placed(graph)
    plugin = calibrators.find(name)
    histograms = _by_gradient(graph, judge.images) if name == "gradient" else graph.histograms
    given = {} if options.calibrator == "auto" else dict(options.calibrator_options)
    if judge.scheme.activation_bits < 8 and any(field.name == "bits" for field in fields(plugin.Options)):
        given["bits"] = judge.scheme.activation_bits
    ranges = find_ranges(
        {tensor: histograms[tensor] for tensor in placement.reads},
        calibrator=name,
        options=plugins.make_options(plugin.Options, given, where=f"calibrator {name}"),
        symmetric=judge.scheme.activations == "int8",
        shared=placement.shared,
    )
    draft = Draft(graph, name, ranges, 0.0)
    return replace(draft, sqnr_db=judge.score(draft, judge.nearest(graph)))


def _by_gradient(graph: Watched, images: Images) -> dict[str, Histogram]:
    """Return the histograms weighed by gradients, observed once for all schemes; the plain ones where there are none."""
    if not graph.by_gradient:
        try:
            found = gradients.observe(graph.path, graph.histograms, images)
        except Unsupported as error:
            found = graph.histograms
            graph.said.append(f"gradient: values weighed by their channels only, since {error}")
        graph.by_gradient.update(found)
    return graph.by_gradient


def _best_graph(drafts: Sequence[Draft]) -> tuple[Draft, list[str]]:
    """Return the draft whose graph came closest, and what each change of the graph gained over the one before."""
    best = max(drafts, key=lambda draft: draft.sqnr_db - _PRICES_DB.get(draft.graph.name, 0.0))
    said = []
    for index, (before, after) in enumerate(itertools.pairwise(drafts), start=1):
        step = {"equalized": "equalization", "smoothed": "smoothing"}[after.graph.name]
        kept = index <= list(drafts).index(best)
        said.append(f"{step} {after.sqnr_db - before.sqnr_db:+.1f} dB: {'kept' if kept else 'dropped'}")
    return best, said


def _scores(drafts: Sequence[Draft], best: Draft) -> str:
    return "; ".join(f"{d.calibrator} {d.sqnr_db:.1f} dB" for d in drafts) + f": {best.calibrator} kept"


def _repair(judge: Judge, draft: Draft, names: Sequence[str]) -> tuple[Repair, list[str]]:
    """Try the repairs of the weights on a draft; return the best one, none at all included, and what each gained."""
    best: Repair = judge.nearest(draft.graph)
    least = draft.sqnr_db
    said = []
    for name in names:
        fitted = _REPAIRS[name](judge, draft)
        gained = judge.score(draft, fitted) - least
        said.append(f"{name.replace('_', ' ')} {gained:+.1f} dB: {'kept' if gained > 0 else 'dropped'}")
        if gained > 0:
            best, least = fitted, least + gained
    return best, said


def _correct_biases(judge: Judge, draft: Draft, observe_means: Any = bias_correction.observe_means) -> Repair:
    means = observe_means(draft.graph.path, draft.ranges, judge.scheme, judge.others, keep_float=judge.keep_float)

    def repair(model: ir.Model, placement: Placement) -> dict[str, qdq.QuantizedWeight]:
        quantized = judge.nearest(draft.graph)(model, placement)
        bias_correction.apply(model, placement, means, quantized)
        return quantized

    return repair


def _correct_biases_in_order(judge: Judge, draft: Draft) -> Repair:
    model = ir.load(draft.graph.path)
    nearest = judge.nearest(draft.graph)(model, place(model, judge.scheme, keep_float=judge.keep_float))
    found = error_feedback.solve(
        draft.graph.path, draft.ranges, judge.scheme, judge.others, nearest=nearest, keep_float=judge.keep_float
    )
    return lambda model, placement: error_feedback.apply(model, placement, found)


def _feed_errors_back(judge: Judge, draft: Draft, refine: rounding.Refine | None = None) -> Repair:
    found = error_feedback.solve(
        draft.graph.path, draft.ranges, judge.scheme, judge.others, refine=refine, keep_float=judge.keep_float
    )
    return lambda model, placement: error_feedback.apply(model, placement, found)


_REPAIRS: dict[str, Callable[[Judge, Draft], Repair]] = {
    "analytic_bias_correction": lambda judge, draft: _correct_biases(judge, draft, analytic_bias.observe_means),
    "bias_correction": _correct_biases,
    "sequential_bias_correction": _correct_biases_in_order,
    "error_feedback": _feed_errors_back,
    "adaptive_rounding": lambda judge, draft: _feed_errors_back(judge, draft, adaptive_rounding.refine),
}
