"""Mean average precision as COCO defines it (0.50 to 0.95), by pycocotools: detections and true boxes go in."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import MissingDependency
from rdeploy.metrics.intervals import Interval

Array = NDArray[Any]

RESAMPLES = 100


def unavailable() -> str | None:
    """Return why mAP cannot be computed here, or None."""
    if importlib.util.find_spec("pycocotools") is not None:
        return None
    return str(
        MissingDependency("mAP needs pycocotools, which is not installed", install="pip install 'rdeploy[coco]'")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """A mAP, and what it is on resampled images: always the same ones for as many images."""

    value: float
    resampled: Array

    @property
    def ci95(self) -> Interval:
        return _interval(self.resampled)


def mean_average_precision(detections: Sequence[Array], truth: Sequence[Array], *, seed: int = 0) -> Average:
    """Return the mAP at IoU 0.50 to 0.95 over all areas, and that of 100 bootstrap samples of the images.

    Args:
        detections: (M, 6) an image: left, top, right, bottom, score, class.
        truth: (K, 5) an image: left, top, right, bottom, class.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        judge = _evaluated(detections, truth)
        images = len(truth)
        value = _accumulated(judge)
        table = np.array(judge.evalImgs, dtype=object).reshape(-1, images)
        rng = np.random.default_rng(seed)
        values = []
        for _ in range(RESAMPLES):
            judge.evalImgs = table[:, rng.integers(0, images, images)].ravel().tolist()
            values.append(_accumulated(judge))
    return Average(value=value, resampled=np.array(values))


def lost(mine: Average, native: Average) -> Interval:
    """Return the interval of how much is lost against the native model, both on the same samples of the images."""
    return _interval(native.resampled - mine.resampled)


def _interval(values: Array) -> Interval:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _evaluated(detections: Sequence[Array], truth: Sequence[Array]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    known, found = COCO(), COCO()
    classes = sorted({int(row[4]) for rows in truth for row in rows})
    images = [{"id": index} for index in range(len(truth))]
    categories = [{"id": index} for index in classes]
    known.dataset = {"images": images, "categories": categories, "annotations": _annotations(truth, scored=False)}
    found.dataset = {"images": images, "categories": categories, "annotations": _annotations(detections, scored=True)}
    known.createIndex()
    found.createIndex()
    judge = COCOeval(known, found, "bbox")
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    judge.params.maxDets = [100]
    judge.evaluate()
    return judge


def _annotations(rows: Sequence[Array], *, scored: bool) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for image, boxes in enumerate(rows):
        for box in boxes:
            left, top, right, bottom = (float(side) for side in box[:4])
            width, height = max(0.0, right - left), max(0.0, bottom - top)
            one = {"id": len(made) + 1, "image_id": image, "category_id": int(box[5 if scored else 4]), "iscrowd": 0}
            made.append({**one, "bbox": [left, top, width, height], "area": width * height})
            if scored:
                made[-1]["score"] = float(box[4])
    return made


def _accumulated(judge: Any) -> float:
    judge.accumulate()
    precision = judge.eval["precision"]  # thresholds x recalls x classes x areas x limits; -1 where a class has no box
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
