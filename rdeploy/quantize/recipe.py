"""Quantize one FP32 graph for one runtime: graph, scheme and calibration images go in, an INT8 graph with its facts comes out.

A straight line: equalize the channels of a copy of the graph and watch the activations of both (`calibrate`, once for every
scheme), try the calibrators and keep the ranges whose graph is closest to FP32 at the output, then try the repairs of the
weights and keep the best. Every step that is kept has been measured on calibration images that it was not fitted to; what
each gained is in `Quantization.recipe`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import plugins
from rdeploy.errors import StageError, Unsupported
from rdeploy.quantize import calibrators, check, families, qdq, rounding
from rdeploy.quantize.histogram import Histogram, settled
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.ranges import Range, activations, find_ranges, observe
from rdeploy.quantize.repair import adaptive_rounding, bias_correction, equalization, error_feedback
from rdeploy.results import Quantization
from rdeploy.types import QuantOptions, QuantScheme

log = logging.getLogger(__name__)

SCORED, FITTED = 32, 64
"""How many calibration images a choice is scored on, and how many others the repairs are fitted to."""

Images = Sequence[NDArray[np.float32]]
"""Calibration images, each (1, C, H, W) and normalised, made when asked for."""

Weights = dict[tuple[str, int, int], qdq.QuantizedWeight]
Repair = Callable[[ir.Model, Placement], dict[str, qdq.QuantizedWeight]]
"""Changes the biases of an FP32 graph in place and returns the integers of its weights."""


@dataclass(frozen=True, slots=True)
class Watched:
    """An FP32 graph that computes what the exported one does, and what was seen of its activations."""

    name: str
    path: Path
    histograms: dict[str, Histogram]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The exported graph and, where channels could be equalized, the equalized one; `recipe` says what to try on them."""

    recipe: str
    graphs: tuple[Watched, ...]
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """One way to quantize, and how close it came at the network's output."""

    graph: Watched
    calibrator: str
    ranges: dict[str, Range]
    sqnr_db: float


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
    graphs = [Watched("exported", path, observe_for(path, schemes, images))]
    said = [f"recipe {name}", _enough(settled(graphs[0].histograms.values()), len(images))]
    if steps.equalize and (
        scaled := equalization.equalize(path, folder / "equalized.onnx", schemes, _evenly(images, FITTED))
    ):
        graphs.append(Watched("equalized", folder / "equalized.onnx", {}))
        graphs[1] = replace(graphs[1], histograms=observe_for(graphs[1].path, schemes, images))
        said.append(f"{scaled} groups of channels can be equalized")
    return Calibration(name, tuple(graphs), tuple(said))


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
) -> Quantization:
    """Write the INT8 form of the calibrated graph to `out`; return what was done and what it gained.

    `weights` keeps quantized weights from one scheme of a graph to the next.

    Raises:
        StageError: an activation or the quantized output is not finite.
        InvariantError: the graph that was written is not legal for the scheme.
    """
    steps = families.RECIPES[calibration.recipe]
    judge = _Judge(
        calibration.graphs[0].path, out, scheme, images, {} if weights is None else weights, options.keep_float
    )
    tried = steps.calibrators if options.calibrator == "auto" else (options.calibrator,)
    drafts = [_draft(judge, calibration.graphs[-1], name, options) for name in tried]
    best = max(drafts, key=lambda draft: draft.sqnr_db)
    said = [*calibration.said, _scores(drafts, best)]
    if len(calibration.graphs) > 1:
        plain = _draft(judge, calibration.graphs[0], best.calibrator, options)
        gained = best.sqnr_db - plain.sqnr_db
        said.append(f"equalization {gained:+.1f} dB: {'kept' if gained > 0 else 'dropped'}")
        best = best if gained > 0 else plain
    repair, repaired = _repair(judge, best, steps.repairs)
    said.extend(repaired)
    placement = judge.write(best, repair)
    check.check_legal(out, scheme)
    return Quantization(
        calibrator=best.calibrator,
        samples=len(images),
        images_sha256="",
        skipped=tuple(placement.skipped),
        recipe=tuple(said),
        coverage=check.coverage(out),
    )


def _draft(judge: _Judge, graph: Watched, name: str, options: QuantOptions) -> _Draft:
    """Find the ranges of one calibrator and score them, with weights rounded to nearest."""
    placement = place(ir.load(graph.path), judge.scheme, keep_float=judge.keep_float)
    plugin = calibrators.find(name)
    given = {} if options.calibrator == "auto" else dict(options.calibrator_options)
    ranges = find_ranges(
        {tensor: graph.histograms[tensor] for tensor in placement.reads},
        calibrator=name,
        options=plugins.make_options(plugin.Options, given, where=f"calibrator {name}"),
        symmetric=judge.scheme.activations == "int8",
        shared=placement.shared,
    )
    draft = _Draft(graph, name, ranges, 0.0)
    return replace(draft, sqnr_db=judge.score(draft, judge.nearest))


def _scores(drafts: Sequence[_Draft], best: _Draft) -> str:
    return "; ".join(f"{d.calibrator} {d.sqnr_db:.1f} dB" for d in drafts) + f": {best.calibrator} kept"


def _repair(judge: _Judge, draft: _Draft, names: Sequence[str]) -> tuple[Repair, list[str]]:
    """Try the repairs of the weights on a draft; return the best one, none at all included, and what each gained."""
    best: Repair = judge.nearest
    least = draft.sqnr_db
    said = []
    for name in names:
        fitted = _REPAIRS[name](judge, draft)
        gained = judge.score(draft, fitted) - least
        said.append(f"{name.replace('_', ' ')} {gained:+.1f} dB: {'kept' if gained > 0 else 'dropped'}")
        if gained > 0:
            best, least = fitted, least + gained
    return best, said


def _correct_biases(judge: _Judge, draft: _Draft) -> Repair:
    means = bias_correction.observe_means(draft.graph.path, draft.ranges, judge.scheme, judge.others)

    def repair(model: ir.Model, placement: Placement) -> dict[str, qdq.QuantizedWeight]:
        quantized = judge.nearest(model, placement)
        bias_correction.apply(model, placement, means, quantized)
        return quantized

    return repair


def _feed_errors_back(judge: _Judge, draft: _Draft, refine: rounding.Refine | None = None) -> Repair:
    found = error_feedback.solve(
        draft.graph.path, draft.ranges, judge.scheme, judge.others, refine=refine, keep_float=judge.keep_float
    )
    return lambda model, placement: error_feedback.apply(model, placement, found)


_REPAIRS: dict[str, Callable[[_Judge, _Draft], Repair]] = {
    "bias_correction": _correct_biases,
    "error_feedback": _feed_errors_back,
    "adaptive_rounding": lambda judge, draft: _feed_errors_back(judge, draft, adaptive_rounding.refine),
}


class _Judge:
    """Writes a draft and says how close its graph comes to FP32 on images that no repair is fitted to."""

    def __init__(
        self,
        exact: Path,
        out: Path,
        scheme: QuantScheme,
        images: Images,
        weights: Weights,
        keep_float: Sequence[str],
    ) -> None:
        self.keep_float = tuple(keep_float)
        self.scheme, self._out, self._weights = scheme, out, weights
        judges = set(_places(len(images), min(SCORED, max(1, len(images) // 2))))
        others = [i for i in range(len(images)) if i not in judges] or sorted(judges)
        self._scored = [images[i] for i in sorted(judges)]
        self.others = [images[others[i]] for i in _places(len(others), FITTED)]
        self._reference = _outputs(exact, self._scored)

    def nearest(self, model: ir.Model, placement: Placement) -> dict[str, qdq.QuantizedWeight]:
        """Round to nearest: the repair that repairs nothing."""
        return qdq.quantize_weights(model.graph, placement, self.scheme, self._weights)

    def score(self, draft: _Draft, repair: Repair) -> float:
        """Return the SQNR in dB at the network's output."""
        self.write(draft, repair)
        return _sqnr_db(self._reference, _outputs(self._out, self._scored))

    def write(self, draft: _Draft, repair: Repair) -> Placement:
        """Write the INT8 graph of a draft with its weights repaired."""
        model = ir.load(draft.graph.path)
        placement = place(model, self.scheme, keep_float=self.keep_float)
        quantized = repair(model, placement)
        qdq.insert(model, placement, draft.ranges, self.scheme, quantized)
        ir.save(model, self._out)
        return placement


def _evenly(images: Images, count: int) -> list[NDArray[np.float32]]:
    return [images[i] for i in _places(len(images), count)]


def _places(size: int, count: int) -> list[int]:
    """Return at most `count` of `size` indices, evenly spread."""
    return [int(i) for i in np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))]


def _outputs(path: Path, images: Images) -> NDArray[np.float64]:
    """Run a graph on the CPU and return its first output, one row an image."""
    name = ir.load(path).graph.outputs[0].name or ""
    rows = [values[name] for values in activations(path, [name], images)]
    return np.concatenate(rows).astype(np.float64)


def _sqnr_db(reference: NDArray[np.float64], outputs: NDArray[np.float64]) -> float:
    if not np.isfinite(outputs).all():
        raise StageError("quantize", "the INT8 graph gives NaN or infinity on calibration images")
    noise = float(np.square(outputs - reference).sum())
    signal = float(np.square(reference).sum())
    return 200.0 if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))


def first_divergence(reference: Path, quantized: Path, image: NDArray[Any], *, floor_db: float = 10.0) -> str | None:
    """Name the first layer of a quantized graph whose output is further than `floor_db` from FP32, with the figures.

    The tensors that both graphs hold under one name are compared in graph order, on one image.
    """
    order = [v.name for n in ir.load(reference).graph for v in n.outputs if v.name]
    kept = {v.name for n in ir.load(quantized).graph for v in n.outputs}
    names = [name for name in order if name in kept]
    exact = next(activations(reference, names, [image]))
    rounded = next(activations(quantized, names, [image]))
    previous = 200.0
    for name in names:
        if exact[name].dtype.kind != "f" or not exact[name].size:
            continue
        now = _sqnr_or_broken(exact[name], rounded[name])
        if now < floor_db:
            return f"the error jumps at {name!r}: {previous:.1f} dB before it, {now:.1f} dB after"
        previous = now
    return None


def _sqnr_or_broken(exact: NDArray[Any], rounded: NDArray[Any]) -> float:
    if not np.isfinite(rounded).all():
        return -200.0
    return _sqnr_db(exact.astype(np.float64), rounded.astype(np.float64))
