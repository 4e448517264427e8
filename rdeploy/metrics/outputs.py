"""What is kept of one run over all images: the outputs, the pixel decisions, the counts against the masks.

The files lie beside each other: `NAME.npy` is the first output, `NAME.1.npy` the second, `NAME.decisions.npy` the
classes of the pixels, `NAME.counts.npy` the counts of `segmentation.count`, `NAME.detections.npy` the boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import ConfigError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """One array an output of the graph, a row an image.

    Dense outputs may hold only every k-th pixel (`Parity` needs no more). `decisions` int16 (N, H, W) are of all pixels;
    `counts` (N, 3, C) are there where masks were given. `detections` (M, 7) of a detector: the image, then what
    `detection.decode` returns.
    """

    arrays: tuple[Array, ...]
    decisions: Array | None = None
    counts: Array | None = None
    detections: Array | None = None

    def __len__(self) -> int:
        return len(self.arrays[0])


def load(path: str | Path) -> Outputs:
    """Memory-map what a run has kept; `path` is the first output's file.

    Raises:
        ConfigError: a file is missing or not a plain array.
    """
    first = Path(path)
    arrays = [_read(first)]
    while (more := first.with_suffix(f".{len(arrays)}.npy")).is_file():
        arrays.append(_read(more))
    kept = {name: first.with_suffix(f".{name}.npy") for name in ("decisions", "counts", "detections")}
    return Outputs(arrays=tuple(arrays), **{name: _read(file) for name, file in kept.items() if file.is_file()})


def _read(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read the outputs from {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"cannot read the outputs from {path}: give a .npy file with one array")
    return array
