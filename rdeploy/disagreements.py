"""The images on which a variant decides most surely otherwise than the native model: outputs and images go in, a file comes out.

The file holds small pictures of the user's own images, so it lies beside the bundles of a run, never inside of one.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdeploy import serde
from rdeploy.data import overlay
from rdeploy.data.images import ImageSet
from rdeploy.metrics import detection
from rdeploy.metrics import outputs as kept
from rdeploy.metrics.outputs import Outputs
from rdeploy.verify import agreement
from rdeploy.verify.answers import boxes_by_image

FOLDER = "disagreements"
MOST = 6
_SIDE, _GAP = 160, 4

Floats = NDArray[np.float64]


def write(
    file: Path, images: ImageSet, variant: Path, native: Path, names: Sequence[str], *, task: str, pixels: Path
) -> bool:
    """Write the worst disagreements to `file`; False where there is none, or the task knows no decisions.

    What an earlier build wrote there is removed in any case.

    Args:
        variant: the variant's outputs on `images`, `native` the native model's.
        names: class names, for what is shown.
        pixels: the images as the native model sees them, a file of uint8 (N, H, W, C): what maps and boxes are drawn on.
    """
    file.unlink(missing_ok=True)
    mine, theirs = kept.load(variant), kept.load(native)
    if task == "classification":
        found = _classes(mine.arrays[0], theirs.arrays[0], images, names)
    else:
        found = _drawn(mine, theirs, task, np.load(pixels, mmap_mode="r"), names)
    entries = [{"name": Path(images.paths[index]).name, **told} for index, told in found]
    if entries:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(serde.dumps(entries), encoding="utf-8")
    return bool(entries)


def worst(mine: NDArray[Any], theirs: NDArray[Any], *, most: int = MOST) -> list[int]:
    """Return the rows of (N, C) logits whose first choices differ, those first on which both sides are surest."""
    first, second = np.argmax(mine, axis=1), np.argmax(theirs, axis=1)
    rows = np.flatnonzero(first != second)
    surety = [probabilities(mine[i])[first[i]] + probabilities(theirs[i])[second[i]] for i in rows]
    return [int(rows[i]) for i in np.argsort(surety)[::-1][:most]]


def probabilities(logits: NDArray[Any]) -> Floats:
    """Return the softmax of one row of logits."""
    shifted = np.exp(logits.astype(np.float64) - float(np.max(logits)))
    share: Floats = shifted / shifted.sum()
    return share


def _classes(
    mine: NDArray[Any], theirs: NDArray[Any], images: ImageSet, names: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the images that a classifier decides otherwise, with what is told of each."""
    if mine.ndim != 2 or mine.shape != theirs.shape or mine.shape[1] < 2:
        return
    for index in worst(mine, theirs):
        told = {"jpeg": _jpeg([_picture(images.read(index))])}
        told |= {"native": _told(theirs[index], names), "variant": _told(mine[index], names)}
        yield index, told if images.labels is None else told | {"label": _name(images.labels[index], names)}


def _drawn(
    mine: Outputs, theirs: Outputs, task: str, pixels: NDArray[Any], names: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the images of whose pixels or boxes the fewest are the same, the native model's answer left, the variant's right."""
    answers: list[Any]
    draw: Callable[[Image.Image, NDArray[Any], Sequence[str]], tuple[Image.Image, str]]
    if task == "segmentation" and mine.decisions is not None and theirs.decisions is not None:
        same, answers = agreement.same_pixels(mine.decisions, theirs.decisions), [theirs.decisions, mine.decisions]
        draw = _map
    elif task == "detection":
        answers = [boxes_by_image(theirs), boxes_by_image(mine)]
        same = np.array([_same_boxes(*pair) for pair in zip(*answers)])
        draw = _boxes
    else:
        return
    for index in np.argsort(same, kind="stable")[:MOST]:
        if same[index] < 1:
            sides = [draw(_picture(pixels[index]), answer[index], names) for answer in answers]
            texts = [text for _, text in sides]
            differ = f"{texts[1]}; {100 * (1 - same[index]):.0f} % differ"
            yield int(index), {"jpeg": _jpeg([side for side, _ in sides]), "native": texts[0], "variant": differ}


def _same_boxes(mine: NDArray[Any], theirs: NDArray[Any]) -> float:
    same, both = detection.matched(mine, theirs)
    return 2 * same / both if both else 1.0


def _map(picture: Image.Image, classes: NDArray[Any], names: Sequence[str]) -> tuple[Image.Image, str]:
    """Return the picture with a class map over it, and the largest classes."""
    picture.thumbnail((_SIDE, _SIDE))
    painted = overlay.paint_classes(picture, agreement.on_grid(classes[None], (1, picture.height, picture.width))[0])
    values, counts = np.unique(classes, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:2]
    return painted, ", ".join(f"{_name(int(values[i]), names)} {100 * counts[i] / classes.size:.0f} %" for i in largest)


def _boxes(picture: Image.Image, boxes: NDArray[Any], names: Sequence[str]) -> tuple[Image.Image, str]:
    """Return the picture with the boxes that count, and how many there are of what."""
    width, shown = picture.width, boxes[boxes[:, 4] >= detection.SHOWN_FROM]
    classes = [int(row[5]) for row in shown]
    picture.thumbnail((_SIDE, _SIDE))
    corners = shown[:, :4] * (picture.width / width)
    drawn = overlay.draw_boxes(picture, list(corners), classes, [""] * len(shown))
    counted = [f"{classes.count(index)} {_name(index, names)}" for index in dict.fromkeys(classes)]
    return drawn, ", ".join(counted) or "nothing"


def _told(logits: NDArray[Any], names: Sequence[str]) -> str:
    choice = int(np.argmax(logits))
    return f"{_name(choice, names)} {100 * probabilities(logits)[choice]:.0f} %"


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if 0 <= index < len(names) else f"class {index}"


def _picture(image: Any) -> Image.Image:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)[..., :3].squeeze())
    return picture.convert("RGB")


def _jpeg(pictures: Iterable[Image.Image]) -> str:
    """Return small pictures side by side as a JPEG in Base64."""
    parts: list[NDArray[np.uint8]] = []
    for picture in pictures:
        picture.thumbnail((_SIDE, _SIDE))
        gap = [np.full((picture.height, _GAP, 3), 255, np.uint8)] if parts else []
        parts += [*gap, np.asarray(picture)]
    file = io.BytesIO()
    Image.fromarray(np.hstack(parts)).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
