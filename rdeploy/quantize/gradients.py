"""Histograms in which a value counts as much as the network's output minds an error there: a graph and images go in.

With v random signs, E (sum_i dv.y/dx_i e_i)^2 is the squared error at the outputs y of errors e in a tensor x, to first
order. The gradients are taken on some images, forward and backward, value by value: which places and which images matter is in
them as well as which channels. ONNX Runtime computes them (`adjoint`); PyTorch does where an operator has no rule there.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
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
from rdeploy.quantize.histogram import Histogram

log = logging.getLogger(__name__)

IMAGES, MACS, PROBES = 16, 8_000_000_000, 2
"""Images at least, and so many multiply-accumulates of them; directions an image."""


def observe(path: Path, known: Mapping[str, Histogram], images: Sequence[NDArray[np.float32]]) -> dict[str, Histogram]:
    """Return histograms of the tensors in `known`, with its extremes.

    Raises:
        Unsupported: there are no gradients; the message says why.
    """
    found = {
        name: dataclasses.replace(seen, weights=None, zeros=0.0, counts=np.zeros(seen.bins), felt=[])
        for name, seen in known.items()
    }
    network = _network(path, set(found), images[0])
    generator = np.random.default_rng(0)
    count = max(IMAGES, MACS // max(cost.summarize(path).macs, 1))
    for index in spread.evenly(len(images), count):
        for probe in network.gradients(images[index], PROBES, generator):
            for name in list(probe):
                found[name].feel(*probe.pop(name))
            heap.release(0)
    return found


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
