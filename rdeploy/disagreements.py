"""The images on which a variant decides most surely otherwise than the native model: outputs and images go in, a file comes out.

The file holds small pictures of the user's own images, so it lies beside the bundles of a run, never inside of one.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdeploy import serde
from rdeploy.data.images import ImageSet
from rdeploy.metrics import outputs as kept

FOLDER = "disagreements"
MOST = 6
_SIDE = 160

Floats = NDArray[np.float64]


def write(file: Path, images: ImageSet, variant: Path, native: Path, names: Sequence[str]) -> bool:
    """Write the worst disagreements of a classifier to `file`; False where there is none, or it is no classifier.

    What an earlier build wrote there is removed in any case.

    Args:
        variant: the variant's outputs on `images`, `native` the native model's.
        names: class names, for what is shown.
    """
    file.unlink(missing_ok=True)
    mine, theirs = kept.load(variant).arrays[0], kept.load(native).arrays[0]
    if mine.ndim != 2 or mine.shape != theirs.shape or mine.shape[1] < 2:
        return False
    entries = [_entry(images, index, mine[index], theirs[index], names) for index in worst(mine, theirs)]
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


def _entry(
    images: ImageSet, index: int, mine: NDArray[Any], theirs: NDArray[Any], names: Sequence[str]
) -> dict[str, str]:
    label = None if images.labels is None else images.labels[index]
    entry = {
        "name": Path(images.paths[index]).name,
        "jpeg": _thumbnail(images.read(index)),
        "native": _told(theirs, names),
        "variant": _told(mine, names),
    }
    return entry if label is None else {**entry, "label": _name(label, names)}


def _told(logits: NDArray[Any], names: Sequence[str]) -> str:
    choice = int(np.argmax(logits))
    return f"{_name(choice, names)} {100 * probabilities(logits)[choice]:.0f} %"


def _name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _thumbnail(image: Any) -> str:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)[..., :3].squeeze())
    picture = picture.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
