"""Adaptive rounding: learn for every weight whether it goes up or down, by gradient descent on what the layer puts out.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020: each weight is floor(w / s) + h(v),
h a stretched sigmoid that a growing penalty pushes to 0 or 1. The layer's squared output error over the calibration images is
(V - W) H (V - W)' with H the second moments of its quantized inputs, so that no image has to be kept and an iteration costs
one product of matrices. It starts from what error feedback rounds to, and a row is changed only where its error gets less.
Runs on a GPU where torch has one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import MissingDependency

Floats = NDArray[np.float64]
ITERATIONS = 1000
_RATE, _PENALTY, _WARM_UP = 2e-2, 0.02, 0.2
_STRETCH = 1.2
_SHARPEST, _SOFTEST = 2.0, 20.0


def refine(wanted: Floats, hessian: Floats, scales: Floats, values: Floats, weight_max: int) -> Floats:
    """Return integers with at most the output error of `values`.

    `wanted` and `values` are (groups, outputs, inputs), `hessian` (groups, inputs, inputs), `scales` (groups, outputs).

    Raises:
        MissingDependency: torch is not installed.
    """
    torch = _torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w, h, s = (torch.as_tensor(a, dtype=torch.float32, device=device) for a in (wanted, hessian, scales[:, :, None]))
    power = torch.diagonal(h, dim1=1, dim2=2).mean(dim=1)[:, None, None]
    lower = torch.clamp(torch.floor(w / s), -weight_max, weight_max)
    start = torch.as_tensor(values, dtype=torch.float32, device=device) - lower
    v = _inverse(torch, 0.5 * torch.clamp(start, 0, 1) + 0.5 * torch.clamp(w / s - lower, 0, 1)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=_RATE)
    for step in range(ITERATIONS):
        soft = torch.clamp(torch.sigmoid(v) * _STRETCH - (_STRETCH - 1) / 2, 0, 1)
        off = (torch.clamp(lower + soft, -weight_max, weight_max) * s - w) / s
        loss = ((off @ h) * off / power).sum()
        done = (step / ITERATIONS - _WARM_UP) / (1 - _WARM_UP)
        if done > 0:
            sharp = _SHARPEST + 0.5 * (_SOFTEST - _SHARPEST) * (1 + np.cos(np.pi * done))
            loss = loss + _PENALTY * (1 - (2 * soft - 1).abs().pow(sharp)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (
        torch.clamp(lower + (torch.sigmoid(v.detach()) > 0.5), -weight_max, weight_max).cpu().numpy().astype(np.float64)
    )
    better = _error(found, wanted, hessian, scales) < _error(values, wanted, hessian, scales)
    return np.where(better[:, :, None], found, values)


def _inverse(torch: Any, fraction: Any) -> Any:
    """Return v with the stretched sigmoid of v equal to a fraction."""
    inside = (torch.clamp(fraction, 0.01, 0.99) + (_STRETCH - 1) / 2) / _STRETCH
    return torch.log(inside / (1 - inside))


def _error(values: Floats, wanted: Floats, hessian: Floats, scales: Floats) -> Floats:
    off = values * scales[:, :, None] - wanted
    return np.asarray(np.einsum("goi,goi->go", off @ hessian, off))


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("adaptive rounding needs torch", install="pip install 'rdeploy[torch]'") from error
    return torch
