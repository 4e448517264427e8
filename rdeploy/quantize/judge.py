"""Judge ways to quantize a graph by what comes out of it: a draft goes in, its SQNR at the network's outputs comes out.

It is scored on calibration images that no repair is fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import spread
from rdeploy.errors import StageError
from rdeploy.graph import cost
from rdeploy.quantize import qdq
from rdeploy.quantize.histogram import Histogram
from rdeploy.quantize.placement import Placement, place
from rdeploy.quantize.ranges import Range, activations, float_outputs
from rdeploy.types import QuantScheme

SCORED, SCORED_MACS, FITTED = 32, 25_000_000_000, 64
"""How many calibration images a choice is scored on at least, and so many multiply-accumulates of them, half of the images at
most: what clipping does to the rare image is not seen on a few. And how many others the repairs are fitted to."""

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
class Draft:
    """One way to quantize, and how close it came at the network's output."""

    graph: Watched
    calibrator: str
    ranges: dict[str, Range]
    sqnr_db: float


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
        wanted = max(SCORED, SCORED_MACS // max(1, cost.summarize(exact).macs))
        judges = set(spread.evenly(len(images), min(wanted, max(1, len(images) // 2))))
        others = [i for i in range(len(images)) if i not in judges] or sorted(judges)
        self._scored = Chosen(images, sorted(judges))
        self.others = Chosen(images, [others[i] for i in spread.evenly(len(others), FITTED)])
        self._reference = outputs(exact, self._scored)
        self._placed: dict[str, Placement] = {}

    def placed(self, graph: Watched) -> Placement:
        """Return where Q/DQ pairs go in a graph, found once for all drafts."""
        if graph.name not in self._placed:
            self._placed[graph.name] = place(ir.load(graph.path), self.scheme, keep_float=self.keep_float)
        return self._placed[graph.name]

    def nearest(self, graph: Watched) -> Repair:
        """Return the repair that repairs nothing: it rounds to nearest."""
        known = self._weights.setdefault(graph.name, {})
        return lambda model, placement: qdq.quantize_weights(model.graph, placement, self.scheme, known)

    def score(self, draft: Draft, repair: Repair) -> float:
        """Return the SQNR in dB at the network's outputs."""
        self.write(draft, repair)
        return sqnr_db(self._reference, outputs(self._out, self._scored))

    def write(self, draft: Draft, repair: Repair) -> Placement:
        """Write the INT8 graph of a draft with its weights repaired."""
        model = ir.load(draft.graph.path)
        placement = place(model, self.scheme, keep_float=self.keep_float)
        quantized = repair(model, placement)
        qdq.insert(model, placement, draft.ranges, self.scheme, quantized)
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


def outputs(path: Path, images: Images) -> list[NDArray[np.float64]]:
    """Run a graph on the CPU and return its outputs in floating point, each with one row an image."""
    rows = list(float_outputs(path, images))
    return [np.stack([values.reshape(-1) for values in output]).astype(np.float64) for output in zip(*rows)]


def sqnr_db(reference: Sequence[NDArray[np.float64]], found: Sequence[NDArray[np.float64]]) -> float:
    """Return the SQNR over all outputs, each counted by its own size: boxes in pixels must not drown the scores."""
    shares = []
    for exact, made in zip(reference, found):
        if not np.isfinite(made).all():
            raise StageError("quantize", "the INT8 graph gives NaN or infinity on calibration images")
        shares.append(float(np.square(made - exact).sum()) / max(float(np.square(exact).sum()), 1e-300))
    noise = float(np.mean(shares)) if shares else 0.0
    return 200.0 if noise == 0 else -10 * float(np.log10(noise))


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
    return sqnr_db([exact.astype(np.float64)], [rounded.astype(np.float64)])
