"""Quantize one FP32 graph for one runtime: graph, scheme and calibration images go in, an INT8 graph with its facts comes out.

The steps: watch the activations once (`observe`), try the calibrators on the histograms and keep the one whose graph is
closest to FP32 at the output, correct the biases where that helps, write the Q/DQ pairs. Every step that is kept has
been measured on calibration images; what each gained is in `Quantization.recipe`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import plugins
from rdeploy.errors import StageError, Unsupported
from rdeploy.quantize import calibrators, check, qdq
from rdeploy.quantize.histogram import Histogram
from rdeploy.quantize.placement import place
from rdeploy.quantize.ranges import Range, activations, find_ranges, observe
from rdeploy.quantize.repair import bias_correction
from rdeploy.types import Quantization, QuantOptions, QuantScheme

log = logging.getLogger(__name__)

AUTO = ("minmax", "percentile", "mse")
"""What `auto` chooses from. Entropy is there by name: it was never the best of the four on a trained network."""
SCORED, AVERAGED = 32, 64
"""How many calibration images a choice is scored on, and how many the means of bias correction are taken over."""

Images = Sequence[NDArray[np.float32]]
"""Calibration images, each (1, C, H, W) and normalised, made when asked for."""


Weights = dict[tuple[str, int, int], qdq.QuantizedWeight]


@dataclass(slots=True)
class _Attempt:
    """One way to quantize: where, with which ranges, and how close it came at the network's output."""

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
            "there is nothing to quantize: the graph holds no convolution or Linear layer with constant weights"
        )
    return observe(path, sorted(tensors), images)


def quantize(
    path: Path,
    out: Path,
    *,
    scheme: QuantScheme,
    histograms: dict[str, Histogram],
    images: Images,
    options: QuantOptions,
    weights: Weights | None = None,
) -> Quantization:
    """Write the INT8 form of the FP32 graph at `path` to `out`; return what was done and what it gained.

    `weights` keeps quantized weights from one scheme of a graph to the next.

    Raises:
        StageError: an activation or the quantized output is not finite.
        InvariantError: the graph that was written is not legal for the scheme.
    """
    weights = {} if weights is None else weights
    judges = np.unique(np.linspace(0, len(images) - 1, min(SCORED, len(images))).astype(int)).tolist()
    scored = [images[i] for i in judges]
    reference = _outputs(path, scored)
    attempts = [
        _attempt(
            path,
            out,
            name,
            scheme=scheme,
            histograms=histograms,
            options=options,
            scored=(scored, reference),
            weights=weights,
        )
        for name in (AUTO if options.calibrator == "auto" else (options.calibrator,))
    ]
    best = max(attempts, key=lambda attempt: attempt.sqnr_db)
    recipe = ["; ".join(f"{a.calibrator} {a.sqnr_db:.1f} dB" for a in attempts) + f": {best.calibrator} kept"]
    means = bias_correction.observe_means(path, best.ranges, scheme, _others(images, judges))
    corrected = _write(path, out, best.ranges, scheme, weights, means=means)
    gained = _sqnr_db(reference, _outputs(out, scored)) - best.sqnr_db
    if gained > 0:
        recipe.append(f"bias correction of {corrected} layers {gained:+.1f} dB: kept")
    else:
        recipe.append(f"bias correction {gained:+.1f} dB: dropped")
        _write(path, out, best.ranges, scheme, weights)
    placement = place(ir.load(path), scheme)
    check.check_legal(out, scheme)
    return Quantization(
        calibrator=best.calibrator,
        samples=len(images),
        images_sha256="",
        skipped=tuple(placement.skipped),
        recipe=tuple(recipe),
        coverage=check.coverage(out),
    )


def _attempt(
    path: Path,
    out: Path,
    name: str,
    *,
    scheme: QuantScheme,
    histograms: dict[str, Histogram],
    options: QuantOptions,
    scored: tuple[Images, NDArray[np.float64]],
    weights: Weights,
) -> _Attempt:
    placement = place(ir.load(path), scheme)
    plugin = calibrators.find(name)
    given = {} if options.calibrator == "auto" else dict(options.calibrator_options)
    ranges = find_ranges(
        {tensor: histograms[tensor] for tensor in placement.reads},
        calibrator=name,
        options=plugins.make_options(plugin.Options, given, where=f"calibrator {name}"),
        symmetric=scheme.activations == "int8",
        shared=placement.shared,
    )
    _write(path, out, ranges, scheme, weights)
    return _Attempt(name, ranges, _sqnr_db(scored[1], _outputs(out, scored[0])))


def _write(
    path: Path,
    out: Path,
    ranges: dict[str, Range],
    scheme: QuantScheme,
    weights: Weights,
    *,
    means: bias_correction.Means | None = None,
) -> int:
    model = ir.load(path)
    placement = place(model, scheme)
    quantized = qdq.quantize_weights(model.graph, placement, scheme, weights)
    corrected = bias_correction.apply(model, placement, means, quantized) if means else 0
    qdq.insert(model, placement, ranges, scheme, quantized)
    ir.save(model, out)
    return corrected


def _others(images: Images, judges: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return the images to average over: not those that judge the result, unless there are too few of them."""
    others = [i for i in range(len(images)) if i not in judges]
    chosen = others if len(others) >= len(judges) else range(len(images))
    return [images[i] for i in list(chosen)[:AVERAGED]]


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
