"""Judge ways to quantize a graph by what comes out of it: a draft goes in, its SQNR at the network's outputs comes out.

It is scored on calibration images that no repair is fitted to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import spread
from rdeploy.graph import cost
from rdeploy.quantize import lowering, qdq
from rdeploy.quantize.histogram import Histogram
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.ranges import Range, activations, float_outputs
from rdeploy.quantize.repair import bias_correction
from rdeploy.quantize.spooled import Spooled
from rdeploy.types import QuantScheme

SCORED, SCORED_MACS = 32, 20_000_000_000
"""How many calibration images a choice is scored on at least, and so many multiply-accumulates of them, half of the images at
most: what clipping does to the rare image is not seen on a few."""
FITTED, FITTED_MOST, FITTED_MACS = 32, 64, 12_500_000_000
"""How many others the weights are repaired on at least and at most, by their multiply-accumulates in between."""

Images = Sequence[NDArray[np.float32]]
"""Calibration images, each (1, C, H, W) and normalised, made when asked for."""

Weights = dict[str, dict[tuple[str, int, int], qdq.QuantizedWeight]]
"""Weights rounded to nearest, by the name of the FP32 graph: they serve several calibrators and schemes."""
Repair = Callable[[ir.Model, Placement], dict[str, qdq.QuantizedWeight]]
"""Changes the biases of an FP32 graph in place and returns the integers of its weights."""


@dataclass(frozen=True, slots=True)
class Watched:
    """An FP32 graph that computes what the exported one does, and what was seen of its activations."""

    name: str
    path: Path
    histograms: dict[str, Histogram]
    by_gradient: dict[str, Histogram] = field(default_factory=dict)
    """Filled when ranges are first chosen by gradients."""
    said: list[str] = field(default_factory=list)
    """What could not be done with it, a sentence each."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What is asked of a `Placement` and does not hold its graph, tensors by their names.

    `lowered` are those whose zero point can go into biases, `layers` are known by what they write (`bias_correction.key_of`).
    """

    reads: tuple[str, ...]
    factors: tuple[str, ...]
    shared: tuple[set[str], ...]
    lowered: frozenset[str]
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Draft:
    """One way to quantize, and how close it came at the network's output."""

    graph: Watched
    calibrator: str
    ranges: dict[str, Range]
    sqnr_db: float
    means: list[bias_correction.Means] = field(default_factory=list)
    """What every layer reads on average, there when biases were corrected once."""


class Judge:
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
        self.scheme, self.images, self._out, self._weights = scheme, images, out, weights
        macs = max(1, cost.summarize(exact).macs)
        wanted = max(SCORED, SCORED_MACS // macs)
        judges = set(spread.evenly(len(images), min(wanted, max(1, len(images) // 2))))
        others = [i for i in range(len(images)) if i not in judges] or sorted(judges)
        self._scored = Chosen(images, sorted(judges))
        self.others = Chosen(
            images, [others[i] for i in spread.evenly(len(others), min(FITTED_MOST, max(FITTED, FITTED_MACS // macs)))]
        )
        self._reference = Spooled([a.astype(np.float32) for a in row] for row in float_outputs(exact, self._scored))
        self._placed: dict[str, Placed] = {}

    def of(self, scheme: QuantScheme) -> Judge:
        """Return a judge on the same images of graphs for another scheme, with weights of the same widths."""
        other = copy.copy(self)
        other.scheme, other._placed = scheme, {}
        return other

    def placed(self, graph: Watched) -> Placed:
        """Return where Q/DQ pairs go in a graph, found once for all drafts."""
        if graph.name not in self._placed:
            found = place(ir.load(graph.path), self.scheme, keep_float=self.keep_float)
            self._placed[graph.name] = Placed(
                tuple(found.reads),
                found.factors(),
                tuple(found.shared),
                lowering.names(found, self.scheme),
                tuple(bias_correction.key_of(node) for node in found.weights),
            )
        return self._placed[graph.name]

    def nearest(self, graph: Watched) -> Repair:
        """Return the repair that repairs nothing: it rounds to nearest."""
        known = self._weights.setdefault(graph.name, {})
        return lambda model, placement: qdq.quantize_weights(model.graph, placement, self.scheme, known)

    def score(self, draft: Draft, repair: Repair) -> float:
        """Return the SQNR in dB at the network's outputs; -inf where they are not finite."""
        self.write(draft, repair)
        return sqnr_db(self._reference, float_outputs(self._out, self._scored))

    def write(self, draft: Draft, repair: Repair) -> Placement:
        """Write the INT8 graph of a draft with its weights repaired."""
        model = ir.load(draft.graph.path)
        placement = place(model, self.scheme, keep_float=self.keep_float)
        quantized = repair(model, placement)
        ranges = lowering.lower(model.graph, placement, draft.ranges, self.scheme, quantized)
        qdq.insert(model, placement, ranges, self.scheme, quantized)
        ir.save(model, self._out)
        return placement


class Chosen(Sequence[NDArray[np.float32]]):
    """Some of the images, by index; none is made before it is asked for."""

    def __init__(self, images: Images, rows: Sequence[int]) -> None:
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Chosen(self._images, self._rows[index])
        return self._images[self._rows[index]]


def evenly(images: Images, count: int) -> Images:
    """Return at most `count` of the images, evenly spread."""
    return Chosen(images, spread.evenly(len(images), count))


def sqnr_db(reference: Iterable[Sequence[NDArray[Any]]], found: Iterable[Sequence[NDArray[Any]]]) -> float:
    """Return the SQNR over all outputs, each counted by its own size: boxes in pixels must not drown the scores.

    Both come image by image and are added up. What is not finite in the reference (a masked logit) is left out; where it is
    finite and what was found is not, the SQNR is -inf.
    """
    sums = np.zeros((0, 2))
    for exact, made in zip(reference, found):
        powers = np.array([_powers(e, m) for e, m in zip(exact, made)]).reshape(-1, 2)
        sums = powers if not len(sums) else sums + powers
    noise = float(np.mean(sums[:, 0] / np.maximum(sums[:, 1], 1e-300))) if len(sums) else 0.0
    if not np.isfinite(noise):
        return -float("inf")
    return 200.0 if noise == 0 else -10 * float(np.log10(noise))


def _powers(exact: NDArray[Any], made: NDArray[Any]) -> tuple[float, float]:
    """Return the power of the error and that of the signal."""
    known = np.isfinite(exact)
    exact, made = exact[known].astype(np.float64), made[known].astype(np.float64)
    return float(np.square(made - exact).sum()), float(np.square(exact).sum())


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
        now = max(-200.0, sqnr_db([[exact[name]]], [[rounded[name]]]))
        if now < floor_db:
            return f"the error jumps at {name!r}: {previous:.1f} dB before it, {now:.1f} dB after"
        previous = now
    return None
