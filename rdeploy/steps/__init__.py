"""The pipeline's stages as cached steps: each looks for its result under the hash of its inputs, and works if there is none.

Data moves by path and sha256. What a step returns is a folder in the store; a killed step leaves none. A module a stage:
`places`, `export`, `quantize`, `rewrite`, `engine`; what they return is in `made`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rdeploy import __version__, serde, worker
from rdeploy.data import preprocess
from rdeploy.data.images import ImageSet
from rdeploy.store import Store
from rdeploy.types import ModelSpec, Size, Target, format_size


@dataclass(slots=True)
class Steps:
    """What every step needs: the target, the cache, a clock for each stage, and where to say what is going on."""

    target: Target
    store: Store
    progress: Callable[[str], None]
    run_measuring: Callable[..., Mapping[str, Any]] = worker.call
    """Who runs a measuring job: a child process here, or one on another machine like this one."""
    timings: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: int = 0
    _outer: str = ""
    _since: float = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, what: str = "") -> Iterator[None]:
        """Say that a stage runs, and count its wall time once: what runs inside it or beside it is part of it."""
        self.progress(f"{name} {what}".rstrip())
        with self._lock:
            if not self._running:
                self._outer, self._since = name, time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    spent = time.perf_counter() - self._since
                    self.timings[self._outer] = self.timings.get(self._outer, 0.0) + spent

    def pixels(self, images: ImageSet, resolution: Size, spec: ModelSpec) -> Path:
        """Return a .npy of the images as the network sees them before normalisation, uint8 (N, h, w, C)."""
        cut = replace(spec.preprocessing, mean=(), std=())
        shape = [images.sha256, resolution, cut, spec.channels]

        def write(folder: Path) -> None:
            with self.stage("images", f"{len(images)} at {format_size(resolution)}"):
                array = preprocess.prepare(images, resolution, spec.preprocessing, channels=spec.channels)
                np.save(folder / "pixels.npy", array)

        return self.store.make("pixels", serde.digest([shape, __version__]), write) / "pixels.npy"

    @property
    def dynamic_batch(self) -> bool:
        """Whether the graph's batch size is left open."""
        return self.target.dynamic_batch or self.target.batch_sizes != (1,)
