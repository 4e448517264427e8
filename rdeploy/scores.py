"""A bundle and labelled images go in, which images each of its engines gets right comes out: accuracy that can be paired."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from rdeploy import bundle, runtime
from rdeploy.data import images
from rdeploy.errors import ConfigError, Unsupported
from rdeploy.snapshot import Share, Snapshot
from rdeploy.verify.answers import decisions

_CHUNK = 64


def scored(snapshot: Snapshot, path: str | Path, data: str | Path) -> Snapshot:
    """Return the snapshot with its engines' accuracy on `data`, image by image.

    An engine that cannot run here keeps what it had. A baseline file is no bundle: it holds what was scored when it was
    written (`--write-baseline` with `--data`), and is returned as it is.

    Raises:
        ConfigError: the images have no labels.
        Unsupported: the network is not a classifier.
    """
    if not bundle.is_bundle(path):
        if not any(one.accuracy and one.accuracy.per_image for one in snapshot.engines):
            raise ConfigError(f"{path}: scores no image by itself; write it again with --write-baseline and --data")
        return snapshot
    folder = bundle.folder_of(path)
    found = {entry["backend"]: entry for entry in bundle.read(folder)["engines"]}
    pictures = images.collect(data, labelled=True, class_names=bundle.labels(folder))
    engines = [
        one
        if runtime.cannot_run(found[one.backend])
        else dataclasses.replace(one, accuracy=_share(folder, one.backend, pictures))
        for one in snapshot.engines
    ]
    return dataclasses.replace(snapshot, engines=tuple(engines))


def _share(folder: Path, backend: str, pictures: images.ImageSet) -> Share:
    right: list[bool] = []
    with runtime.load(folder, backend=backend) as model:
        for start in range(0, len(pictures), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(pictures)))
            outputs: Any = model([pictures.read(row) for row in rows])
            if not isinstance(outputs, np.ndarray) or outputs.ndim != 2:
                raise Unsupported(
                    f"{folder}: only classifiers are scored image by image, (N, classes); leave out --data"
                )
            truth = np.asarray(pictures.labels)[rows.start : rows.stop]
            right += (decisions(outputs) == truth).tolist()
    return Share(
        right=sum(right),
        samples=len(right),
        per_image="".join("1" if one else "0" for one in right),
        images=pictures.sha256,
    )
