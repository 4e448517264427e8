"""Which images choose, which judge, and which are trained on: a build goes in, three sets come out that share no image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rdeploy import spread
from rdeploy.data.images import ImageSet
from rdeploy.intake import Build

LEAST = 128
"""The fewest images for the cheap steps: a half to choose by, a half to judge on; fewer cannot tell two crops apart."""
_CHOOSE_BY = 256
_HELD_BACK = 1 / 10
_MOST_HELD_BACK = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images that choose, images that judge, images to train on; no image is in two of them."""

    choosing: ImageSet
    judging: ImageSet
    training: ImageSet | None = None
    labelled: bool = False
    """Whether the labels of `judging` are the model's classes."""
    chooser_labels: tuple[int, ...] | None = None

    def limited(self, choosing: int, judging: int) -> Split:
        """Return the same with at most so many images to choose by and to judge on, evenly taken."""
        rows = spread.shares(len(self.choosing), choosing)
        labels = None if self.chooser_labels is None else tuple(self.chooser_labels[row] for row in rows)
        return replace(
            self,
            choosing=self.choosing.subset(rows) if len(rows) < len(self.choosing) else self.choosing,
            judging=self.judging.subset(spread.shares(len(self.judging), judging))
            if judging < len(self.judging)
            else self.judging,
            chooser_labels=labels,
        )


def split_images(this: Build) -> Split | str:
    """Return which images choose, judge and train; or why the ladder cannot be climbed."""
    labelled = bool(this.request.data) and this.spec.task == "classification" and this.judged.labels is not None
    if this.training is not None:
        return _split_of_training(this, this.training, labelled=labelled)
    if not this.has_real_images:
        return "no images were given to choose by and to judge on"
    if len(this.calib) < LEAST:
        return f"{len(this.calib)} images, {LEAST} are the fewest to choose by and to judge on"
    order = np.random.default_rng([this.request.seed, 3]).permutation(len(this.calib)).tolist()
    apart = labelled and not _same(this.calib, this.judged)
    choosing = this.calib.subset(sorted(order[: _CHOOSE_BY if apart else min(_CHOOSE_BY, len(order) // 2)]))
    judging = _without(this.judged if labelled else this.calib, [choosing])
    if len(judging) < LEAST // 2:
        return f"{len(judging)} images are left to judge on, {LEAST // 2} are the fewest"
    return _split(this, choosing, judging, labelled=labelled)


def _split_of_training(this: Build, training: ImageSet, *, labelled: bool) -> Split | str:
    pool = _without(training, [this.judged])
    if len(pool) < 2 * LEAST:
        return f"{len(pool)} images to train on that nothing is judged on, {2 * LEAST} are the fewest"
    order = np.random.default_rng([this.request.seed, 3]).permutation(len(pool)).tolist()
    held = min(_MOST_HELD_BACK, max(LEAST // 2, round(_HELD_BACK * len(pool))))
    choosing = pool.subset(sorted(order[:held]))
    judging = this.judged if labelled else pool.subset(sorted(order[held : 2 * held]))
    rest = pool.subset(sorted(order[held if labelled else 2 * held :]))
    return _split(this, choosing, judging, labelled=labelled, training=rest)


def _split(
    this: Build, choosing: ImageSet, judging: ImageSet, *, labelled: bool, training: ImageSet | None = None
) -> Split:
    known: dict[str, int] = {}
    if labelled and this.judged.labels is not None:
        known = dict(zip(_names(this.judged), this.judged.labels))
    labels = [known.get(name) for name in _names(choosing)]
    return Split(
        choosing=choosing,
        judging=judging,
        training=training,
        labelled=labelled,
        chooser_labels=None if None in labels or not labels else tuple(label for label in labels if label is not None),
    )


def _names(found: ImageSet) -> list[str]:
    return [str(Path(path).resolve()) for path in found.paths]


def _same(first: ImageSet, second: ImageSet) -> bool:
    return bool(set(_names(first)) & set(_names(second)))


def _without(found: ImageSet, others: Sequence[ImageSet]) -> ImageSet:
    taken = {name for other in others for name in _names(other)}
    kept = [row for row, name in enumerate(_names(found)) if name not in taken]
    return found if len(kept) == len(found) else found.subset(kept)
