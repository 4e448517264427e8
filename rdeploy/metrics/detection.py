"""Detection: raw outputs of a network go in, boxes come out; matched with others, or scored as COCO does.

Understood, as arrays with N first:
- one output (N, 4 + C, A), YOLOv8's: centre, size, and the scores of C classes for A candidates, in pixels;
- one output (N, A, 5 + C), YOLOv5's: the same with an objectness before the scores;
- one output (N, k, 6), an end-to-end detector's: left, top, right, bottom in pixels, score and class, nothing left to suppress;
- boxes (N, A, 4) as left, top, right, bottom in pixels, and scores (N, A, C), in either order;
- `pred_boxes` (N, Q, 4), relative centre and size, and `softmax_logits` (N, Q, C + 1), DETR's, of which the last class is none,
  or `sigmoid_logits` (N, Q, C), RT-DETR's, where each class has a score of its own. Plain `logits` are what COCO's number of
  classes tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy.errors import Unsupported

Array = NDArray[Any]

BOXES = "pred_boxes"
"""The boxes of transformers' detectors, which belong to their logits."""
SOFTMAX, SIGMOID = QUERIES = ("softmax_logits", "sigmoid_logits")
_COCO = {92: SOFTMAX, 91: SIGMOID, 80: SIGMOID}
"""COCO has 80 classes, numbered up to 90; DETR adds one for none."""

MATCHED_AT = 0.5
SHOWN_FROM = 0.25
"""The score from which a detection counts when variants are compared; mAP takes all of them."""
_LEAST_SCORE = 0.001
_MOST = 100
_SUPPRESSED_AT = 0.65


def layout(shapes: Sequence[tuple[int, ...]], names: Sequence[str] = ()) -> str:
    """Return which of the forms above some outputs have: "columns", "rows", "boxes", or of queries the name of their logits.

    An end-to-end detector's are "rows" as well: YOLOv5's of one class have the same shape, the values tell them apart.

    Raises:
        Unsupported: none of them, or whether the queries have a class for none is not known.
    """
    if BOXES in names:
        return _queries(shapes, names)
    if len(shapes) == 1 and len(shapes[0]) == 3:
        return "columns" if shapes[0][1] < shapes[0][2] != 6 else "rows"
    if len(shapes) == 2 and all(len(shape) == 3 for shape in shapes) and 4 in (shapes[0][2], shapes[1][2]):
        return "boxes"
    told = ", ".join(str(shape) for shape in shapes)
    raise Unsupported(
        f"outputs of the shapes {told} are no detector's that rdeploy knows: (N, 4 + classes, candidates), "
        "(N, candidates, 5 + classes), or boxes (N, candidates, 4) with scores (N, candidates, classes)"
    )


def _queries(shapes: Sequence[tuple[int, ...]], names: Sequence[str]) -> str:
    told = next((name for name in QUERIES if name in names), None)
    classes = next((shape[-1] for shape, name in zip(shapes, names) if name != BOXES), 0)
    if told is None and classes not in _COCO:
        raise Unsupported(
            f"whether the last of the {classes} classes of `logits` is none (DETR) or each has a score of its own (RT-DETR, "
            f"Deformable DETR) is not known: name that output {SOFTMAX} or {SIGMOID}"
        )
    return told or _COCO[classes]


def box_axes(shapes: Sequence[tuple[int, ...]], names: Sequence[str] = ()) -> tuple[int, int] | None:
    """Return which output holds boxes in pixels and along which axis their four numbers lie first; None if relative."""
    found = layout(shapes, names)
    if found in QUERIES:
        return None
    if found == "boxes":
        return (0 if shapes[0][2] == 4 else 1), 2
    return (0, 1) if found == "columns" else (0, 2)


def decode(rows: Sequence[Array], names: Sequence[str], size: tuple[int, int]) -> list[Array]:
    """Return the detections of each image, (M, 6): left, top, right, bottom in pixels of `size` (h, w), score, class.

    Overlapping boxes of one class are suppressed (at an IoU of 0.65), and at most 100 with the best scores are kept.
    """
    if len(rows) == 1 and _is_final(rows[0]):
        return [_ordered(table) for table in rows[0].astype(np.float32)]
    boxes, scores = _separate(rows, names, size)
    return [_best(box, score) for box, score in zip(boxes, scores)]


def _is_final(table: Array) -> bool:
    """Whether an output (N, k, 6) holds corners, scores and whole classes; YOLOv5's last column is a probability."""
    if table.ndim != 3 or table.shape[2] != 6:
        return False
    seen = table[table[:, :, 4] >= _LEAST_SCORE]
    ordered = (seen[:, 2:4] >= seen[:, :2]).all()
    return bool(ordered and (seen[:, 4] <= 1).all() and (seen[:, 5] == np.rint(seen[:, 5])).all())


def _ordered(table: Array) -> Array:
    order = np.argsort(-table[:, 4], kind="stable")
    found: Array = table[order[table[order, 4] >= _LEAST_SCORE][:_MOST]]
    return found


def _separate(rows: Sequence[Array], names: Sequence[str], size: tuple[int, int]) -> tuple[Array, Array]:
    """Return corner boxes (N, A, 4) and scores (N, A, C)."""
    form = layout([array.shape for array in rows], names)
    if form in QUERIES:
        logits, boxes = (rows[0], rows[1]) if names[1] == BOXES else (rows[1], rows[0])
        pixels = boxes * np.array([size[1], size[0], size[1], size[0]], np.float32)
        if form == SIGMOID:
            return _corners(pixels), np.exp(-np.logaddexp(0.0, -logits))
        powers = np.exp(logits - logits.max(axis=2, keepdims=True))
        return _corners(pixels), (powers / powers.sum(axis=2, keepdims=True))[:, :, :-1]
    if form == "boxes":
        first = rows[0].shape[2] == 4
        return (rows[0], rows[1]) if first else (rows[1], rows[0])
    table = rows[0].transpose(0, 2, 1) if form == "columns" else rows[0]
    if form == "columns":
        return _corners(table[:, :, :4]), table[:, :, 4:]
    return _corners(table[:, :, :4]), table[:, :, 5:] * table[:, :, 4:5]


def _corners(boxes: Array) -> Array:
    half = boxes[..., 2:4] / 2
    corners: Array = np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)
    return corners


def _best(boxes: Array, scores: Array) -> Array:
    classes = scores.argmax(axis=1)
    values = np.nan_to_num(scores.max(axis=1), nan=0.0)
    order = np.argsort(-values, kind="stable")
    order = order[values[order] >= _LEAST_SCORE][: 10 * _MOST]
    found = np.column_stack([boxes[order], values[order], classes[order]]).astype(np.float32)
    kept: list[int] = []
    overlap = overlaps(found[:, :4], found[:, :4])
    for index in range(len(found)):
        rivals = [k for k in kept if found[k, 5] == found[index, 5]]
        if not rivals or overlap[index, rivals].max() <= _SUPPRESSED_AT:
            kept.append(index)
        if len(kept) == _MOST:
            break
    return found[kept]


def overlaps(first: Array, second: Array) -> Array:
    """Return the intersection over union of every box of one set with every one of another, (M, K)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:4], second[None, :, 2:4])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(b[:, 2:4] - b[:, :2], 0, None).prod(axis=1) for b in (first, second)]
    union: Array = areas[0][:, None] + areas[1][None, :] - both
    share: Array = np.where(union > 0, both / np.maximum(union, 1e-12), 0.0)
    return share


def matched(mine: Array, theirs: Array) -> tuple[int, int]:
    """Return how many detections of two sets are the same, and the mean number in a set, doubled (so both are counted).

    The same: one of the same class with an IoU of at least 0.5, each used once, the best score first; only detections
    with a score of at least 0.25 count.
    """
    mine, theirs = (one[one[:, 4] >= SHOWN_FROM] for one in (mine, theirs))
    overlap = overlaps(mine[:, :4], theirs[:, :4])
    overlap[mine[:, None, 5] != theirs[None, :, 5]] = 0.0
    free, pairs = set(range(len(theirs))), 0
    for index in range(len(mine)):
        best = max(free, key=lambda other: overlap[index, other], default=None)
        if best is not None and overlap[index, best] >= MATCHED_AT:
            free.remove(best)
            pairs += 1
    return pairs, len(mine) + len(theirs)


def to_image(detections: Array, size: tuple[int, int], view: tuple[float, float, float, float]) -> Array:
    """Return detections in pixels of the image, of which the network saw `view` (top, left, bottom, right)."""
    top, left, bottom, right = view
    across, down = (right - left) / size[1], (bottom - top) / size[0]
    moved: Array = np.array(detections)
    moved[:, [0, 2]] = moved[:, [0, 2]] * across + left
    moved[:, [1, 3]] = moved[:, [1, 3]] * down + top
    return moved
