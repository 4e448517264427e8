"""Names of classes, as folders or CSV columns spell them, go in; the model's class indices come out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from rdeploy.errors import ConfigError
from rdeploy.plugins import did_you_mean

_WORDNET = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000


def class_indices(
    names: set[str], class_names: Sequence[str], *, strict: bool = True
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return name -> class index and the names of the classes.

    In this order: all names are integers (they are the indices); the model's own `class_names` contain them (whole, or
    as one of the synonyms "tench, Tinca tinca"); they are WordNet ids of ImageNet; else their sorted order, but not
    when the model has another number of classes: that would be wrong labels.

    Raises:
        ConfigError: `strict`, and the names do not fit the model's classes.
    """
    ordered = sorted(names)
    if all(name.isdecimal() for name in ordered):
        return _by_number(ordered, class_names, strict=strict)
    known = _synonyms(class_names)
    if class_names and all(_plain(name) in known for name in ordered):
        return {name: known[_plain(name)] for name in ordered}, tuple(class_names)
    if all(_WORDNET.fullmatch(name) for name in ordered) and len(class_names) in (0, _IMAGENET_CLASSES):
        return _by_wordnet(ordered, class_names, strict=strict)
    if strict and class_names and len(class_names) != len(ordered):
        stranger = next(name for name in ordered if _plain(name) not in known)
        raise ConfigError(
            f"class {stranger!r} is not one of the model's {len(class_names)} classes"
            f"{did_you_mean(stranger, class_names)}; name the class folders (or labels) after the model's labels, "
            f"or by class index 0 to {len(class_names) - 1}"
        )
    return {name: index for index, name in enumerate(ordered)}, tuple(class_names) or tuple(ordered)


def _by_number(
    ordered: list[str], class_names: Sequence[str], *, strict: bool
) -> tuple[dict[str, int], tuple[str, ...]]:
    largest = max(int(name) for name in ordered)
    if strict and class_names and largest >= len(class_names):
        raise ConfigError(
            f"class {largest} is out of range: the model has {len(class_names)} classes, 0 to {len(class_names) - 1}"
        )
    return {name: int(name) for name in ordered}, tuple(class_names)


def _by_wordnet(
    ordered: list[str], class_names: Sequence[str], *, strict: bool
) -> tuple[dict[str, int], tuple[str, ...]]:
    if len(ordered) == _IMAGENET_CLASSES:
        return {name: index for index, name in enumerate(ordered)}, tuple(class_names) or tuple(ordered)
    synsets = _imagenet_synsets()
    if synsets and all(name in synsets for name in ordered):
        return {name: synsets[name] for name in ordered}, tuple(class_names) or tuple(synsets)
    if strict and class_names:
        raise ConfigError(
            f"{len(ordered)} class folders are named by WordNet id ({ordered[0]}), which only timm's table can place "
            "among the 1000 classes: pip install 'rdeploy[zoo]', or name the folders by class index"
        )
    return {name: index for index, name in enumerate(ordered)}, tuple(class_names) or tuple(ordered)


def _imagenet_synsets() -> dict[str, int]:
    """Return WordNet id -> ImageNet-1k index from the table in timm's wheel (found, not imported), or nothing."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return {}
    table = Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    if not table.is_file():
        return {}
    return {name: index for index, name in enumerate(table.read_text().split())}


def _synonyms(class_names: Sequence[str]) -> dict[str, int]:
    """Map every whole name and every comma-separated synonym to its index; a spelling of two classes names neither."""
    known: dict[str, int] = {}
    twice: set[str] = set()
    for index, name in enumerate(class_names):
        for spelling in {_plain(name), *(_plain(part) for part in name.split(","))}:
            if known.setdefault(spelling, index) != index:
                twice.add(spelling)
    return {spelling: index for spelling, index in known.items() if spelling and spelling not in twice}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
