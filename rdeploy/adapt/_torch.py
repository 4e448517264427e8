"""Run a PyTorch module on pixels: uint8 images go in, NumPy outputs come out, dense ones at a given size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rdeploy.adapt import Pixels, Run
from rdeploy.types import ModelSpec, Preprocessing, Size

_BATCH = 32


def runner(module: nn.Module, spec: ModelSpec, native: NativeShape = None) -> Run:
    """Return a function that runs the module; `native` is the shape of the native output, which dense answers are brought to."""

    def run(pixels: Pixels) -> Iterator[Sequence[NDArray[Any]]]:
        device = device_of(module)
        for start in range(0, len(pixels), _BATCH):
            images = normalised(torch.from_numpy(np.array(pixels[start : start + _BATCH])), spec.preprocessing, device)
            with torch.inference_mode():
                outputs = [at_size(one, native) for one in tensors(module(images))]
            yield [one.float().cpu().numpy() for one in outputs]

    return run


NativeShape = Size | None


def device_of(module: nn.Module) -> torch.device:
    """Return where the module's weights are; the CPU where it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def normalised(pixels: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Turn uint8 (N, H, W, C) into float32 (N, C, H, W) on a device: `(pixels / 255 - mean) / std`."""
    values = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return values.sub_(mean).div_(std)


def tensors(output: Any) -> tuple[Tensor, ...]:
    """Return the tensors of what a network answers."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def at_size(output: Tensor, size: NativeShape) -> Tensor:
    """Bring a dense output (N, C, h, w) to another size, as the exported graph does; others pass."""
    if size is None or output.ndim != 4 or tuple(output.shape[2:]) == tuple(size):
        return output
    return F.interpolate(output, size=size, mode="bilinear", align_corners=False)
