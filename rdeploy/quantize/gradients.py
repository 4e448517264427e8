"""Histograms in which a value counts as much as the network's output minds an error there: a graph and images go in.

With v random signs, E (dv.y/dx)^2 is the sum over the outputs y of (dy/dx)^2. It is taken on a few images, forward and backward
in torch, value by value: which places and which images matter is in it as well as which channels.
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
from rdeploy.quantize.histogram import Histogram

IMAGES, PROBES = 24, 2


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
        name: dataclasses.replace(seen, weights=None, zeros=0.0, counts=np.zeros(seen.bins))
        for name, seen in known.items()
    }
    generator = torch.Generator().manual_seed(0)
    for index in spread.evenly(len(images), IMAGES):
        for name, (values, squares) in network.gradients(images[index], set(found), PROBES, generator).items():
            found[name].update_weighted(values, squares)
    return found
