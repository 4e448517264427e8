"""From image files to answers, stage by stage: decode, preprocess, infer (with the transfers that a runtime tells)."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from rdeploy.data import images as image_files
from rdeploy.data import preprocess
from rdeploy.errors import Unsupported
from rdeploy.measured import EndToEnd
from rdeploy.worker.engine import as_input, fill_batch
from rdeploy.worker.jobs import Entry

_MIN_IMAGES = 10


def from_files(session: Any, entry: Entry, *, images: list[str], seconds: float) -> EndToEnd:
    """Take the images in turn, one at a time, for `seconds` and at least 10 times; the first round is not counted.

    Raises:
        Unsupported: nobody said how this model wants its images.
    """
    if entry.preprocessing is None:
        raise Unsupported("an ONNX file does not say how it wants its images: end to end needs a bundle")
    info, files = session.inputs[0], image_files.ImageSet(paths=tuple(images), labels=None, class_names=(), sha256="")
    size, channels = info.image_size, info.channels
    stages: dict[str, list[float]] = {name: [] for name in ("decode", "preprocess", "inference", "upload", "download")}
    started = None
    for count in itertools.count():
        if count == min(len(images), _MIN_IMAGES):
            started = time.perf_counter()
            stages = {name: [] for name in stages}
        if started and len(stages["decode"]) >= _MIN_IMAGES and time.perf_counter() - started >= seconds:
            break
        marks = [time.perf_counter()]
        picture = files.read(count % len(images))
        marks.append(time.perf_counter())
        pixels = preprocess.to_pixels(picture, size, entry.preprocessing, channels=channels)
        batch = as_input(fill_batch(pixels[np.newaxis], entry.batch), entry.preprocessing, info)
        marks.append(time.perf_counter())
        session.run({info.name: batch})
        marks.append(time.perf_counter())
        for name, (start, end) in zip(("decode", "preprocess", "inference"), itertools.pairwise(marks), strict=True):
            stages[name].append((end - start) * 1000.0)
    if hasattr(session, "transfers_ms"):
        for _ in stages["inference"]:
            for name, milliseconds in session.transfers_ms({info.name: batch}).items():
                stages[name].append(milliseconds)
    raw = {f"{name}_ms": tuple(values) for name, values in stages.items()}
    return EndToEnd(images=len(images), **raw)  # type: ignore[arg-type]
