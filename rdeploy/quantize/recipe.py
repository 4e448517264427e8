"""Quantize one FP32 graph for one runtime: graph, scheme and calibration images go in, an INT8 graph with its facts comes out.

A straight line: equalize the channels of a copy of the graph and watch the activations of both (`calibrate`, once for every
scheme), try the calibrators, repair the best of each graph and keep the one that comes closest to FP32 at the output. Ranges
are compared with the biases corrected, graphs with their weights repaired: what a correction takes back counts for nothing.
Every step that is kept has been measured on calibration images that it was not fitted to; what each gained is in
`Quantization.recipe`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx_ir as ir

from rdeploy import plugins
from rdeploy.errors import StageError, Unsupported
from rdeploy.quantize import calibrators, check, families, gradients, patches, scores
from rdeploy.quantize.histogram import Histogram, settled
from rdeploy.quantize.judge import Draft, Images, Judge, Repair, Watched, Weights, evenly
from rdeploy.quantize.placement import place
from rdeploy.quantize.ranges import Lowered, Signed, find_ranges, observe
from rdeploy.quantize.repair import equalization, smoothing
from rdeploy.quantize.repairs import REPAIRS
from rdeploy.results import Quantization
from rdeploy.types import QuantOptions, QuantScheme

log = logging.getLogger(__name__)

_PRICES_DB = {"smoothed": 0.5}
"""What a change of the graph has to gain beyond nothing: smoothing costs operators at run time."""
_WATCHED = 128
"""How many images the channels of the graph are watched on, to equalize and to smooth them, half of the images at most: on
these no channel goes beyond the others any more, and ranges must see that it does on others."""
_CORRECTION = "bias_correction"
_OF_FACTORS = "mean_extremes"
"""Another calibrator for what attention multiplies: `mse+mean_extremes` has its ranges there, those of `mse` elsewhere. A
softmax looks at the extremes, which small errors and their derivatives do not tell."""
_FINALISTS = 2
"""So many calibrators are compared with the biases corrected, and that by gradients besides."""
_GUARDED, _GUARD_DB, _NEAR_DB = "gradient", 0.3, 1.0
"""Ranges by gradients allow for images that were not seen, the others fit those that were, which judge as well: they are compared
if none is further ahead with weights rounded to nearest, and kept, by gradients on half of the images and more, if none is
further ahead than this."""
_WITHIN_DB = 2.0
"""A graph that is further behind another is not repaired: no repair is that uneven."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The exported graph and, where channels could be equalized, the equalized one; `recipe` says what to try on them."""

    recipe: str
    graphs: tuple[Watched, ...]
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A draft with the best repair that was tried on it, none at all included, and what each gained."""

    draft: Draft
    repair: Repair
    sqnr_db: float
    said: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()


@dataclass(slots=True)
class Pinned:
    """What the first quantization chose and later ones keep: they differ by the layers that are left in float, no more.

    Schemes of two runtimes may share one where their activations are of one kind. `layers` are those that `repair` was fitted
    to; it serves whoever quantizes the same ones.
    """

    calibrator: str = ""
    graph: str = ""
    said: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    repair: Repair | None = None
    repaired: tuple[str, ...] = ()
    widened: str | None = None
    """The calibrator with queries x keys in integers (`scores`), "" where they stay in float, None where it was not tried."""
    widening: tuple[str, ...] = ()
    """What that cost."""

    def take(self, best: _Attempt, layers: tuple[str, ...], changed: Sequence[str]) -> None:
        """Keep what was chosen, and what was said on the way to it, where nothing was chosen yet."""
        if not self.graph:
            self.calibrator, self.graph = best.draft.calibrator, best.draft.graph.name
            self.said = (*self.said, *changed)
            self.layers, self.repair, self.repaired = layers, best.repair, best.said


def observe_for(path: Path, schemes: Sequence[QuantScheme], images: Images) -> dict[str, Histogram]:
    """Watch, in one pass over the images, every tensor that any of the schemes quantizes."""
    graph = ir.load(path)
    tensors: set[str] = set()
    for scheme in schemes:
        tensors |= set(place(graph, scores.widest(scheme)).reads)
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
    schemes = [families.scheme_for(name, scheme) for scheme in schemes]
    if steps.patches and any("Conv" in scheme.output_ops for scheme in schemes):
        path = folder / "patches.onnx" if patches.rewrite(path, folder / "patches.onnx") else path
    watched = evenly(images, min(_WATCHED, max(1, len(images) // 2)))
    graphs = [_watch("exported", path, schemes, images)]
    said = [f"recipe {name}", _enough(settled(graphs[0].histograms.values()), len(images))]
    if steps.equalize and (scaled := equalization.equalize(path, folder / "equalized.onnx", schemes, watched)):
        graphs.append(_watch("equalized", folder / "equalized.onnx", schemes, images))
        said.append(f"{scaled} groups of channels can be equalized")
    if steps.smooth and (smoothed := smoothing.smooth(path, folder / "smoothed.onnx", schemes, watched)):
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
    scheme = families.scheme_for(calibration.recipe, scheme)
    judge = Judge(
        calibration.graphs[0].path, out, scheme, images, {} if weights is None else weights, options.keep_float
    )
    pinned = Pinned() if pinned is None else pinned
    widened = pinned.widened if scheme.integer_attention else ""
    if widened:
        judge = judge.of(scores.widest(scheme))
    if pinned.graph:
        graph = next(graph for graph in calibration.graphs if graph.name == pinned.graph)
        attempts = [_begin(judge, _draft(judge, graph, widened or pinned.calibrator, options))]
    else:
        attempts, pinned.said = _attempts(judge, calibration, steps, options)
    if _best(attempts).sqnr_db == -math.inf:
        raise StageError("quantize", "the INT8 graph gives NaN or infinity on calibration images, whatever its ranges")
    best, changed = _known(judge, attempts[0], pinned) or _chosen(judge, attempts, steps)
    pinned.take(best, _layers(judge, best.draft), changed)
    if widened is None:
        judge, best, pinned.widening = _with_scores(judge, best, steps, options)
        pinned.widened = best.draft.calibrator if judge.scheme != scheme else ""
    placement = judge.write(best.draft, best.repair)
    check.check_legal(out, scheme)
    return Quantization(
        calibrator=best.draft.calibrator,
        samples=len(images),
        images_sha256="",
        skipped=tuple(placement.skipped),
        recipe=(*pinned.said, *best.said, *(pinned.widening if scheme.integer_attention else ())),
        coverage=check.coverage(out),
    )


def _attempts(
    judge: Judge, calibration: Calibration, steps: families.Recipe, options: QuantOptions
) -> tuple[list[_Attempt], tuple[str, ...]]:
    """Return an attempt at each graph, and what to say.

    The calibrators are tried on the graph that was changed most, the best of them with the biases corrected. The best of these
    is tried on the other graphs, and the others on the one of them that is ahead.
    """
    tried = steps.calibrators if options.calibrator == "auto" else (options.calibrator,)
    *others, last = calibration.graphs
    drafts = [_draft(judge, last, name, options) for name in tried]
    if options.calibrator == "auto" and judge.placed(last).factors:
        drafts += [_draft(judge, last, f"{name}+{_OF_FACTORS}", options) for name in tried if name != _OF_FACTORS]
    said = [*calibration.said, "; ".join(f"{draft.calibrator} {draft.sqnr_db:.1f} dB" for draft in drafts)]
    compared = [_begin(judge, one) for one in _finalists(drafts)]
    if _CORRECTION in steps.repairs:
        compared = [_repair(judge, attempt, _CORRECTION) for attempt in compared]
        if len(compared) > 1:
            told = ", ".join(f"{attempt.draft.calibrator} {attempt.sqnr_db:.1f} dB" for attempt in compared)
            said.append(f"biases corrected, {told}: {_best_ranges(compared).draft.calibrator} kept")
    best = _best_ranges(compared)
    attempts = [_begun(judge, graph, best, options) for graph in others]
    if attempts and (lead := _best(attempts)).sqnr_db > best.sqnr_db:
        again = [_begun(judge, lead.draft.graph, one, options) for one in compared if one is not best]
        attempts[attempts.index(lead)] = _best_ranges([lead, *again])
        told = ", ".join(f"{one.draft.calibrator} {one.sqnr_db:.1f} dB" for one in (lead, *again))
        said.append(
            f"on the {lead.draft.graph.name} graph, {told}: {_best_ranges([lead, *again]).draft.calibrator} kept"
        )
    left_out = dict.fromkeys(line for graph in calibration.graphs for line in graph.said)
    return [*attempts, best], (*said, *left_out)


def _begun(judge: Judge, graph: Watched, like: _Attempt, options: QuantOptions) -> _Attempt:
    """Begin an attempt at another graph with the same calibrator, its biases corrected where the other's are."""
    attempt = _begin(judge, _draft(judge, graph, like.draft.calibrator, options))
    return _repair(judge, attempt, _CORRECTION) if like.tried else attempt


def _finalists(drafts: Sequence[Draft]) -> list[Draft]:
    ranked = sorted(drafts, key=lambda one: -one.sqnr_db)
    near = [one for one in ranked if _by_gradients(one) and one.sqnr_db >= ranked[0].sqnr_db - _NEAR_DB]
    return list({id(one): one for one in (*ranked[:_FINALISTS], *near[:1])}.values())


def _by_gradients(draft: Draft) -> int:
    """Return on how many images the gradients were seen that a draft's ranges are by, 0 where they are not."""
    felt = max((len(histogram.felt) for histogram in draft.graph.by_gradient.values()), default=0)
    return felt // gradients.PROBES if draft.calibrator.partition("+")[0] == _GUARDED else 0


def _is_guarded(draft: Draft) -> bool:
    """Whether a draft's ranges are by gradients on half of the images and more: on a few they allow for less."""
    images = max((histogram.batches for histogram in draft.graph.histograms.values()), default=0)
    return _by_gradients(draft) >= max(1, images / 2)


def _best_ranges(attempts: Sequence[_Attempt]) -> _Attempt:
    """Return the attempt whose ranges are expected to come closest on images that were not seen."""
    return max(attempts, key=lambda attempt: attempt.sqnr_db + _GUARD_DB * _is_guarded(attempt.draft))


def _best(attempts: Sequence[_Attempt]) -> _Attempt:
    return max(attempts, key=lambda attempt: attempt.sqnr_db)


def _draft(judge: Judge, graph: Watched, label: str, options: QuantOptions) -> Draft:
    """Find the ranges of one calibrator, or of two ("mse+mean_extremes"), and score them, with weights rounded to nearest."""
    placed = judge.placed(graph)
    name, _, of_factors = label.partition("+")
    plugin = calibrators.find(name)
    histograms = _by_gradient(graph, judge.images) if name == "gradient" else graph.histograms
    given = {} if options.calibrator == "auto" else dict(options.calibrator_options)
    if judge.scheme.activation_bits < 8 and any(field.name == "bits" for field in fields(plugin.Options)):
        given["bits"] = judge.scheme.activation_bits
    settings = plugins.make_options(plugin.Options, given, where=f"calibrator {name}")
    found = functools.partial(find_ranges, symmetric=judge.scheme.activations == "int8", shared=placed.shared)
    ranges = found(
        {t: histograms[t] for t in placed.reads if t not in placed.lowered}, calibrator=name, options=settings
    )
    moved = find_ranges({t: histograms[t] for t in placed.lowered}, calibrator=name, options=settings, symmetric=False)
    ranges |= {tensor: Lowered(*span) for tensor, span in moved.items()}
    if of_factors:
        factors = {tensor: graph.histograms[tensor] for tensor in placed.factors}
        ranges |= found(factors, calibrator=of_factors, options=calibrators.find(of_factors).Options())
    if judge.scheme.integer_attention:
        ranges |= {tensor: Signed(*ranges[tensor]) for tensor in placed.factors if ranges[tensor][0] < 0}
    draft = Draft(graph, label, ranges, 0.0)
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


def _best_graph(attempts: Sequence[_Attempt]) -> tuple[_Attempt, list[str]]:
    """Return the attempt that came closest, and what each change of the graph gained over the one before."""
    best = max(attempts, key=lambda attempt: attempt.sqnr_db - _PRICES_DB.get(attempt.draft.graph.name, 0.0))
    said = []
    for index, (before, after) in enumerate(itertools.pairwise(attempts), start=1):
        step = {"equalized": "equalization", "smoothed": "smoothing"}[after.draft.graph.name]
        kept = index <= list(attempts).index(best)
        said.append(f"{step} {after.sqnr_db - before.sqnr_db:+.1f} dB: {'kept' if kept else 'dropped'}")
    return best, said


def _begin(judge: Judge, draft: Draft) -> _Attempt:
    return _Attempt(draft, judge.nearest(draft.graph), draft.sqnr_db)


def _repaired(judge: Judge, attempts: Sequence[_Attempt], names: Sequence[str]) -> list[_Attempt]:
    """Try the repairs of the weights that were not tried yet on every attempt that may still win."""
    least = _best(attempts).sqnr_db - _WITHIN_DB
    return [
        functools.reduce(functools.partial(_repair, judge), names, attempt) if attempt.sqnr_db >= least else attempt
        for attempt in attempts
    ]


def _chosen(judge: Judge, attempts: Sequence[_Attempt], steps: families.Recipe) -> tuple[_Attempt, list[str]]:
    """Return the attempt that came closest with its weights repaired, finished by what takes too long to try on all."""
    best, said = _best_graph(_repaired(judge, attempts, steps.repairs))
    return functools.reduce(functools.partial(_repair, judge), steps.finish, best), said


def _repair(judge: Judge, attempt: _Attempt, name: str) -> _Attempt:
    """Try a repair in place of the one that is best so far, once; of two ways to finish it the better one."""
    if name in attempt.tried:
        return attempt
    found_db = {
        fitted: judge.score(attempt.draft, fitted) for fitted in REPAIRS[name](judge, attempt.draft, attempt.repair)
    }
    fitted, found = max(found_db.items(), key=lambda pair: pair[1])
    better = found > attempt.sqnr_db
    line = f"{name.replace('_', ' ')} {found - attempt.sqnr_db:+.1f} dB: {'kept' if better else 'dropped'}"
    told = replace(attempt, said=(*attempt.said, line), tried=(*attempt.tried, name))
    return replace(told, repair=fitted, sqnr_db=found) if better else told


def _with_scores(
    judge: Judge, attempt: _Attempt, steps: families.Recipe, options: QuantOptions
) -> tuple[Judge, _Attempt, tuple[str, ...]]:
    """Keep queries x keys and the patch embedding in integers where the runtime is faster so and they cost little."""
    wider, graph = judge.of(scores.widest(judge.scheme)), attempt.draft.graph
    if wider.scheme == judge.scheme or not wider.placed(graph).factors:
        return judge, attempt, ()
    labels = scores.calibrators(attempt.draft.calibrator, options.calibrator)
    drafts = _finalists([_draft(wider, graph, label, options) for label in labels])
    tried = _repaired(wider, [_begin(wider, draft) for draft in drafts], steps.repairs[:1])
    best = _best(tried)
    if best.sqnr_db >= attempt.sqnr_db - scores.HOPELESS_DB:
        best = _best(_repaired(wider, tried, steps.repairs[1:]))
        best = functools.reduce(functools.partial(_repair, wider), steps.finish, best)
    gained = best.sqnr_db - attempt.sqnr_db
    kept = gained >= -scores.COST_DB
    line = f"queries x keys and patches in integers, which is faster, {gained:+.1f} dB: {'kept' if kept else 'dropped'}"
    return (wider, replace(best, said=attempt.said), (line,)) if kept else (judge, attempt, (line,))


def _known(judge: Judge, attempt: _Attempt, pinned: Pinned) -> tuple[_Attempt, list[str]] | None:
    """Return the attempt with the repair that was fitted to the same layers for another runtime, if it does no harm here."""
    if pinned.repair is None or pinned.layers != _layers(judge, attempt.draft):
        return None
    found = judge.score(attempt.draft, pinned.repair)
    if found < attempt.sqnr_db:
        return None
    return replace(attempt, repair=pinned.repair, sqnr_db=found, said=pinned.repaired), []


def _layers(judge: Judge, draft: Draft) -> tuple[str, ...]:
    """Return the layers that are quantized, with what their integers depend on besides."""
    layers = judge.placed(draft.graph).layers
    return (f"weights to {judge.scheme.weight_max}, {judge.scheme.activation_bits} bits", *layers)
