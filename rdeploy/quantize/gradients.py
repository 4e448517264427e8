"""Histograms in which a value counts as much as the network's output minds an error there: a graph and images go in.

With v random signs, E (sum_i dv.y/dx_i e_i)^2 is the squared error at the outputs y of errors e in a tensor x, to first
order. The gradients are taken on some images, forward and backward, value by value: which places and which images matter is in
them as well as which channels. ONNX Runtime computes them (`adjoint`); PyTorch does where an operator has no rule there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import spread
from rdeploy.errors import Unsupported
from rdeploy.graph import cost
from rdeploy.quantize import heap
from rdeploy.quantize.adjoint.network import Network
from rdeploy.quantize.histogram import COARSE, Histogram
from rdeploy.quantize.spooled import Spooled

log = logging.getLogger(__name__)

IMAGES, MACS, PROBES = 16, 8_000_000_000, 2
"""Images at least, and so many multiply-accumulates of them; directions an image."""


def observe(path: Path, known: Mapping[str, Histogram], images: Sequence[NDArray[np.float32]]) -> dict[str, Histogram]:
    """Return histograms of the tensors in `known`, with its extremes.

    Raises:
        Unsupported: there are no gradients; the message says why.
    """
    found = {
        name: dataclasses.replace(seen, weights=None, zeros=0.0, counts=np.zeros(seen.bins), felt=())
        for name, seen in known.items()
    }
    network = _network(path, set(found), images[0])
    felt: set[str] = set()

    def rows() -> Iterator[list[NDArray[np.float32]]]:
        generator = np.random.default_rng(0)
        count = max(IMAGES, MACS // max(cost.summarize(path).macs, 1))
        for index in spread.evenly(len(images), count):
            for probe in network.gradients(images[index], PROBES, generator):
                felt.update(probe)
                for name in list(probe):
                    found[name].feel(*probe.pop(name))
                yield [_taken(one) for one in found.values()]
                heap.release(0)

    kept = Spooled(rows())
    for place, name in enumerate(found):
        found[name].felt = _Column(kept, place) if name in felt else ()
    return found


def _taken(histogram: Histogram) -> NDArray[np.float32]:
    """Return the row that a histogram has just felt, zeros where it felt none, and take it out of it."""
    row = histogram.felt[0] if histogram.felt else np.zeros(COARSE, np.float32)
    histogram.felt = ()
    return row


class _Column(Sequence[NDArray[np.float32]]):
    """What one tensor's histogram felt: as large as hundreds of histograms, and kept where it needs no memory."""

    def __init__(self, rows: Spooled, place: int) -> None:
        self._rows, self._place = rows, place

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows.column(self._place)[index]

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return iter(self._rows.column(self._place))


def _network(path: Path, names: Collection[str], image: NDArray[np.float32]) -> Any:
    """Return what has the gradients of a graph: `Network.gradients`."""
    try:
        return Network(path, names, image)
    except Unsupported as error:
        try:
            from rdeploy.quantize import differentiable
        except ImportError:
            raise Unsupported(f"{error}; PyTorch may have one, and is not installed", stage="quantize") from error
        log.info("gradients by PyTorch: %s", error)
        return differentiable.Graph(ir.load(path).graph, names)
