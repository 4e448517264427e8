"""Make a lower resolution good: one module per step of the ladder; each proposes a change, and whoever calls it judges.

A step defines `Options`, `unsupported(subject, options) -> str | None` (why there is nothing to do here, in plain words) and
`apply(subject, options) -> Change | None` (None: nothing better was found). It sees only the images that it may choose by
(and, to train, those of `training`); whether its change is kept is decided on others. It changes no module that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rdeploy import plugins
from rdeploy.metrics.closeness import Closeness, answers, closeness
from rdeploy.types import ModelSpec, Preprocessing, Size

Pixels = NDArray[np.uint8]
Run = Callable[[Pixels], Iterator[Sequence[NDArray[Any]]]]
"""Takes images (N, H, W, C) as the network sees them, before normalisation; yields the outputs batch by batch."""

STEPS = ("preprocessing", "batchnorm", "distill")
"""In the order in which they are tried: what costs least first, and what a later one starts from."""


class AdaptStep(Protocol):
    """What a module in this folder defines."""

    Options: type

    def unsupported(self, subject: Subject, options: Any) -> str | None: ...

    def apply(self, subject: Subject, options: Any) -> Change | None: ...


class Pictures(Protocol):
    """Images that can be asked for as the variant would see them under one preprocessing or several."""

    def __len__(self) -> int: ...

    def pixels(self, preprocessings: Sequence[Preprocessing], rows: Sequence[int]) -> list[Pixels]: ...


class Views(Protocol):
    """Training images: the same random part of each, as the native model and as the variant see it."""

    @property
    def labelled(self) -> bool: ...

    def __len__(self) -> int: ...

    def batch(self, epoch: int, rows: Sequence[int]) -> tuple[Pixels, Pixels]: ...

    def truth(self, epoch: int, rows: Sequence[int]) -> NDArray[np.int64] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """The images to choose by, the native model's answers to them, and their labels where they are known."""

    pictures: Pictures
    native: Sequence[NDArray[Any]]
    labels: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A variant on its way down the ladder.

    `module` is the reduced network as the steps before have left it, `native` the untouched one; both are None for an ONNX
    file. `run` executes the variant as it is. `sees_crop` says that another crop would change only what the network sees,
    not what its answer is about (a dense answer's pixels are those of the picture). `folder` is where a training may keep
    what it needs to go on after a kill.
    """

    name: str
    spec: ModelSpec
    resolution: Size
    preprocessing: Preprocessing
    module: Any
    native: Any
    run: Run
    choosing: Choosing
    names: tuple[str, ...] = ()
    sees_crop: bool = True
    training: Views | None = None
    seed: int = 0
    folder: Path = Path()
    tell: Callable[[str], None] = print

    @property
    def dense_size(self) -> Size | None:
        """The size (h, w) of the native model's dense answers; None where an answer is a vector."""
        return dense_size(self.choosing.native, self.spec.task)

    def score(self, run: Run, preprocessing: Preprocessing, rows: Sequence[int] | None = None) -> Closeness:
        """Return how close the variant comes to the native model on the images to choose by, or on some of them."""
        rows = range(len(self.choosing.pictures)) if rows is None else rows
        (pixels,) = self.choosing.pictures.pixels([preprocessing], rows)
        return self.compare(run, pixels, rows)

    def compare(self, run: Run, pixels: Pixels, rows: Sequence[int]) -> Closeness:
        """Return the same of pixels that are there already."""
        labels = self.choosing.labels
        return closeness(
            answers_of(run, pixels, self.spec, self.names),
            [self.choosing.native[row] for row in rows],
            task=self.spec.task,
            labels=None if labels is None else [labels[row] for row in rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a step proposes: another preprocessing, or other weights (a state dict); and what to say of it."""

    detail: str
    preprocessing: Preprocessing | None = None
    state: dict[str, Any] | None = None


def dense_size(native: Sequence[NDArray[Any]], task: str) -> Size | None:
    """Return the size (h, w) of dense answers; None where an answer is a vector or boxes."""
    shape = np.shape(native[0])
    return None if task == "detection" or len(shape) < 2 else (int(shape[-2]), int(shape[-1]))


def answers_of(run: Run, pixels: Pixels, spec: ModelSpec, names: Sequence[str] = ()) -> list[NDArray[Any]]:
    """Run images and return the answer to each, in the compact form that is compared."""
    return [
        answer
        for rows in run(pixels)
        for answer in answers(rows, task=spec.task, names=names, frame=spec.native_resolution)
    ]


def find(name: str) -> Any:
    """Import a step by name; the result satisfies `AdaptStep`."""
    return plugins.find("rdeploy.adapt", name)
