"""Histograms in which a value counts as much as the network's output minds an error there: a graph and images go in.

With v random signs, E (sum_i dv.y/dx_i e_i)^2 is the squared error at the outputs y of errors e in a tensor x, to first
order. The gradients are taken on some images, forward and backward in torch, value by value: which places and which images
matter is in them as well as which channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy import spread
from rdeploy.errors import Unsupported
from rdeploy.graph import cost
from rdeploy.quantize.histogram import Histogram

IMAGES, MACS, PROBES = 16, 8_000_000_000, 2
"""Images at least, and so many multiply-accumulates of them; directions an image."""


def observe(path: Path, known: Mapping[str, Histogram], images: Sequence[NDArray[np.float32]]) -> dict[str, Histogram]:
    """Return histograms of the tensors in `known`, with its extremes.

    Raises:
        Unsupported: there are no gradients; the message says why.
    """
    try:
        import torch

        from rdeploy.quantize import differentiable
    except ImportError as error:
        raise Unsupported(f"gradients need PyTorch: {error}", stage="quantize") from error
    network = differentiable.Graph(ir.load(path).graph)
    found = {
        name: dataclasses.replace(seen, weights=None, zeros=0.0, counts=np.zeros(seen.bins), felt=[])
        for name, seen in known.items()
    }
    generator = torch.Generator().manual_seed(0)
    count = max(IMAGES, MACS // max(cost.summarize(path).macs, 1))
    for index in spread.evenly(len(images), count):
        for probe in network.gradients(images[index], set(found), PROBES, generator):
            for name, (values, slopes) in probe.items():
                found[name].feel(values, slopes)
    return found
