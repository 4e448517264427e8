"""Collect images: a folder, class folders, a CSV or an array file goes in, an `ImageSet` of readable ones comes out."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdeploy.data.classes import class_indices
from rdeploy.data.decode import SUFFIXES, UNREADABLE, open_image, reason_of, why_unreadable
from rdeploy.errors import ConfigError
from rdeploy.serde import digest, file_sha256

Skipped = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageSet:
    """Images that can be read, in a fixed order. `labels` are class indices; `skipped` holds (path, reason).

    `masks` are files with the class of each pixel (see `pairs`), `boxes` label files
    (see `boxes`). `sha256` covers the contents in order. `array` (uint8 N, H, W, C) holds the pixels where they came from
    an array file; `rows` are the rows of it that belong to this set.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...]
    sha256: str
    skipped: Skipped = ()
    array: NDArray[np.uint8] | None = None
    rows: tuple[int, ...] = ()
    masks: tuple[str, ...] | None = None
    boxes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, rows: Sequence[int]) -> ImageSet:
        """Return some of the images, in the order in which they are named."""
        kept = list(rows)
        return replace(
            self,
            paths=tuple(self.paths[row] for row in kept),
            labels=None if self.labels is None else tuple(self.labels[row] for row in kept),
            rows=tuple(self.rows[row] for row in kept) if self.rows else (),
            masks=None if self.masks is None else tuple(self.masks[row] for row in kept),
            boxes=None if self.boxes is None else tuple(self.boxes[row] for row in kept),
            sha256=digest([self.sha256, kept]),
        )

    def read(self, index: int) -> Any:
        """Return one image, decoded: a Pillow image or a uint8 array (H, W, C).

        Raises:
            ConfigError: the file can no longer be read.
        """
        if self.array is not None:
            return np.asarray(self.array[self.rows[index]])
        try:
            return open_image(Path(self.paths[index]))
        except UNREADABLE as error:
            raise ConfigError(f"{self.paths[index]} could not be read: {reason_of(error)}") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    label: str | None


def collect(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    labelled: bool = False,
    class_names: Sequence[str] = (),
) -> ImageSet:
    """Find the images at `path`, skip those that cannot be read, keep a seeded sample of at most `limit`.

    `path` is a folder (searched recursively), a folder of class folders, a CSV of path,label (with or without a header;
    paths relative to the CSV), or a `.npy` / `.npz` of uint8 (N, H, W, C) (`.npz`: `images` and, for labels, `labels`).
    Class folders and label columns name classes: by `class_names` (the model's labels), WordNet ids, numbers, or else
    in sorted order. Sampled images stay in their original order.

    Raises:
        ConfigError: nothing is there, nothing can be read, or `labelled` and there are no labels.
    """
    source = Path(path).expanduser()
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of images must be at least 1, not {limit}")
    if not source.exists():
        raise ConfigError(f"{source} does not exist: give a folder of images, a CSV of path,label, or a .npy/.npz file")
    if source.suffix.lower() in (".npy", ".npz"):
        return _from_array(source, limit=limit, seed=seed, labelled=labelled)
    if source.is_dir():
        entries = _from_folder(source)
        wanted = "make one folder per class, or give a CSV of path,label"
    elif source.suffix.lower() in (".csv", ".tsv", ".txt"):
        entries = _from_csv(source)
        wanted = "add a label column"
    else:
        raise ConfigError(f"{source} is not a folder, a CSV of path,label, or a .npy/.npz file")
    if not entries:
        raise ConfigError(f"no images in {source}: it holds no file with an image suffix (.jpg, .png, .webp, ...)")
    has_labels = all(entry.label is not None for entry in entries)
    if labelled and not has_labels:
        raise ConfigError(f"{source} has no labels: {wanted}")
    kept, skipped = _readable(entries, limit=limit, seed=seed)
    if not kept:
        name, reason = skipped[0]
        raise ConfigError(f"none of the {len(entries)} images of {source} can be read; the first, {name}: {reason}")
    return _image_set(kept, skipped, class_names=class_names if labelled else (), entries=entries, labelled=labelled)


def _image_set(
    kept: list[_Entry], skipped: Skipped, *, class_names: Sequence[str], entries: list[_Entry], labelled: bool
) -> ImageSet:
    names: tuple[str, ...] = tuple(class_names)
    labels: tuple[int, ...] | None = None
    if all(entry.label is not None for entry in entries):
        # Class indices come from all the entries, so a sample without some class does not shift the others.
        index, names = class_indices({str(entry.label) for entry in entries}, names, strict=labelled)
        labels = tuple(index[str(entry.label)] for entry in kept)
    paths = tuple(str(entry.path) for entry in kept)
    with ThreadPoolExecutor(_threads()) as pool:
        digests = list(pool.map(file_sha256, paths))
    sha256 = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return ImageSet(paths=paths, labels=labels, class_names=names, sha256=sha256, skipped=skipped)


def _from_folder(root: Path) -> list[_Entry]:
    """List the image files below `root`, sorted; the label is the first folder below it when every file is in one."""
    found = sorted(_walk(root, seen=set()))
    parts = [path.relative_to(root).parts for path in found]
    in_classes = bool(parts) and all(len(part) > 1 for part in parts)
    return [_Entry(path, part[0] if in_classes else None) for path, part in zip(found, parts)]


def _walk(folder: Path, *, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield image files, following links but entering each folder once: a loop of links ends."""
    try:
        stat = folder.stat()
        children = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"cannot read the folder {folder}: {error.strerror}") from error
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    for child in children:
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _walk(child, seen=seen)
        elif child.suffix.lower() in SUFFIXES:
            yield child


def _from_csv(path: Path) -> list[_Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable UTF-8 CSV file: {error}") from error
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row and row[0].strip()]
    if not rows:
        raise ConfigError(f"{path} is empty: give one path,label a line")
    where, label = _columns(rows[0])
    if where is None:
        where, label = 0, 1
        rows = rows[_names_columns(path.parent, rows) :]
    else:
        rows = rows[1:]
    entries = []
    for row in rows:
        name = row[where].strip() if where < len(row) else ""
        text_label = row[label].strip() if label is not None and label < len(row) else ""
        entries.append(_Entry(path.parent / name, text_label or None))
    return entries


def _columns(header: list[str]) -> tuple[int | None, int | None]:
    """Return the positions of the path and label columns when the row is a header, else (None, None)."""
    names = [name.strip().lower() for name in header]
    where = next((names.index(n) for n in ("path", "file", "filename", "image", "image_path") if n in names), None)
    label = next(
        (names.index(n) for n in ("label", "class", "target", "class_index", "class_name") if n in names), None
    )
    return where, label


def _names_columns(folder: Path, rows: list[list[str]]) -> bool:
    """Whether the first row is a header of other names: it names no file, and the next one does."""
    files = [folder / row[0].strip() for row in rows[:2]]
    return len(files) == 2 and files[0].suffix.lower() not in SUFFIXES and not files[0].exists() and files[1].exists()


def _readable(entries: list[_Entry], *, limit: int | None, seed: int) -> tuple[list[_Entry], Skipped]:
    """Try entries, in a seeded order when there are more than `limit`, until enough can be read."""
    order = list(range(len(entries)))
    if limit is not None and limit < len(entries):
        random.Random(seed).shuffle(order)
    wanted = len(entries) if limit is None else limit
    good: list[int] = []
    bad: list[tuple[int, str]] = []
    remaining = iter(order)
    with warnings.catch_warnings(), ThreadPoolExecutor(_threads()) as pool:
        # Pillow's warning about large images would come before the reason why this one is skipped.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        while batch := list(islice(remaining, wanted - len(good))):
            for index, reason in zip(batch, pool.map(lambda i: why_unreadable(entries[i].path), batch)):
                if reason is None:
                    good.append(index)
                else:
                    bad.append((index, reason))
    skipped = tuple((str(entries[index].path), reason) for index, reason in sorted(bad))
    return [entries[index] for index in sorted(good)], skipped


def _from_array(path: Path, *, limit: int | None, seed: int, labelled: bool) -> ImageSet:
    images, labels = _load_array(path)
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise ConfigError(f"{path} holds {images.dtype} of shape {images.shape}: give uint8 of shape (N, H, W, C)")
    if images.shape[3] > 16 and images.shape[1] <= 4:
        raise ConfigError(f"{path} holds shape {images.shape}, which looks like (N, C, H, W): give (N, H, W, C)")
    if labelled and labels is None:
        raise ConfigError(f"{path} has no labels: give an .npz with the arrays images and labels")
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise ConfigError(f"{path}: labels must be {len(images)} integers, not {labels.dtype} of shape {labels.shape}")
    if labelled and labels is not None and labels.min() < 0:
        raise ConfigError(f"{path}: label {labels.min()} is no class: they count from 0")
    rows = list(range(len(images)))
    if limit is not None and limit < len(rows):
        rows = sorted(random.Random(seed).sample(rows, limit))
    digest = hashlib.sha256(repr(images.shape[1:]).encode())
    for row in rows:
        digest.update(np.ascontiguousarray(images[row]).data)
    return ImageSet(
        paths=tuple(f"{path}[{row}]" for row in rows),
        labels=None if labels is None else tuple(int(labels[row]) for row in rows),
        class_names=(),
        sha256=digest.hexdigest(),
        array=images,
        rows=tuple(rows),
    )


def _load_array(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read the arrays without pickle; a `.npy` stays on disk (memory-mapped)."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            images = next((name for name in ("images", "x", "arr_0") if name in names), None)
            if images is None:
                raise ConfigError(f"{path} holds the arrays {', '.join(names) or 'none'}: name the images 'images'")
            labels = next((name for name in ("labels", "y", "arr_1") if name in names), None)
            return file[images], None if labels is None else file[labels]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not a readable NumPy file: {' '.join(str(error).split())}") from error


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def load_pixels(path: Path) -> NDArray[np.uint8]:
    """Memory-map the pixels that `preprocess.prepare` made and a step saved."""
    pixels: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    return pixels
