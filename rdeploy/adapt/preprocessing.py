"""Search crop, resize filter and antialiasing together: a variant and images go in, the preprocessing that suits it comes out.

At a lower resolution objects are smaller and the picture is blurred more than in training; another crop and a sharper filter
win some of that back without touching a weight (Touvron et al. 2019, "Fixing the train-test resolution discrepancy"). All
combinations are tried on a few images, the better ones on more (successive halving).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rdeploy.adapt import Change, Subject
from rdeploy.types import Preprocessing

KEPT = 1 / 4
"""The share of the candidates that goes into the next round, which has twice as many images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The fractions and the filters that are tried, besides those that the model has; `False` is without antialiasing."""

    crop_pcts: tuple[float, ...] = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    filters: tuple[tuple[str, bool], ...] = (
        ("bilinear", True),
        ("bicubic", True),
        ("lanczos", True),
        ("box", True),
        ("bilinear", False),
    )
    first: int = 32
    """How many images the first round has."""


def unsupported(subject: Subject, options: Options) -> str | None:
    """Return why nothing can be chosen: the images reach the network at the native size, as it was trained."""
    if subject.resolution == subject.spec.native_resolution:
        return "the network is given images of its native size"
    return None


def apply(subject: Subject, options: Options) -> Change | None:
    """Return the best preprocessing if it is another one than the subject's."""
    known = subject.preprocessing
    left = [known, *(one for one in candidates(subject, options) if one != known)]
    order = np.random.default_rng(subject.seed).permutation(len(subject.choosing.pictures)).tolist()
    count = options.first
    while len(left) > 1:
        left = _ranked(subject, left, sorted(order[:count]))
        if count >= len(order):
            break
        left = _front_and_known(left, known)
        count *= 2
    best = left[0]
    return None if best == known else Change(detail=described(best, known), preprocessing=best)


def described(found: Preprocessing, before: Preprocessing) -> str:
    """Say what is different: `crop 0.9 instead of 0.875, lanczos instead of bicubic`."""
    parts = []
    if found.crop_pct != before.crop_pct:
        parts.append(f"crop {found.crop_pct:g} instead of {before.crop_pct:g}")
    if _filter(found) != _filter(before):
        parts.append(f"{_filter(found)} instead of {_filter(before)}")
    return ", ".join(parts)


def _filter(preprocessing: Preprocessing) -> str:
    sharp = preprocessing.interpolation == "bilinear" and not preprocessing.antialias
    return preprocessing.interpolation + " without antialiasing" * sharp


def candidates(subject: Subject, options: Options) -> list[Preprocessing]:
    """Return every combination of crop and filter that is tried."""
    known = subject.preprocessing
    crops = sorted({known.crop_pct, *options.crop_pcts}) if subject.sees_crop else [known.crop_pct]
    return [
        replace(known, crop_pct=crop, interpolation=name, antialias=antialias)
        for crop, (name, antialias) in itertools.product(crops, options.filters)
    ]


def _ranked(subject: Subject, candidates: Sequence[Preprocessing], rows: Sequence[int]) -> list[Preprocessing]:
    """Return the candidates, the best on these images first."""
    pixels = subject.choosing.pictures.pixels(candidates, rows)
    found = [subject.compare(subject.run, images, rows) for images in pixels]
    scores = {index: (float(one.smooth.mean()), one.share) for index, one in enumerate(found)}
    return [candidates[index] for index in sorted(scores, key=lambda index: scores[index], reverse=True)]


def _front_and_known(ranked: Sequence[Preprocessing], known: Preprocessing) -> list[Preprocessing]:
    """Return the best of the candidates, and in any case what the model has."""
    kept = list(ranked[: max(2, round(KEPT * len(ranked)))])
    return kept if known in kept else [*kept, known]
