"""What transformers' config.json and preprocessor_config.json say goes in; `Facts` come out. No transformers needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rdeploy.models.spec import Facts
from rdeploy.types import Size

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_CONVNEXT_SQUASHES_FROM = 384


def facts_of(config: Mapping[str, Any], processor: Mapping[str, Any], *, task: str) -> Facts:
    """Return native size, preprocessing and labels; what is not said stays None, and is assumed and named later."""
    resolution, crop_pct, mode = _geometry(processor)
    vision = config.get("vision_config") or config
    normalises = processor.get("do_normalize", "image_mean" in processor)
    channels = vision.get("num_channels")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    return Facts(
        native_resolution=resolution or _size(vision.get("image_size")),
        mean=_numbers(mean) if normalises else ((0.0,) if processor else None),
        std=_numbers(std) if normalises else ((1.0,) if processor else None),
        interpolation=_RESAMPLE.get(int(processor.get("resample") or 2)) if processor else None,
        crop_pct=crop_pct,
        crop_mode=mode,
        channels=None if channels is None else int(channels),
        labels=_labels(config.get("id2label")),
        task=task,
    )


def _geometry(processor: Mapping[str, Any]) -> tuple[Size | None, float | None, str | None]:
    """Return (native size, crop_pct, crop_mode) of a processor's size, crop_size and crop_pct."""
    size, crop = processor.get("size"), _size(processor.get("crop_size"))
    if not isinstance(size, (Mapping, int)) or not processor.get("do_resize", True):
        return crop, None, None
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if not processor.get("do_center_crop", False) or crop is None:
        crop = None
    if shortest is None:
        whole = _size(size)
        if whole is None:
            return crop, None, None
        return (whole, 1.0, "squash") if crop is None else (crop, crop[0] / whole[0], "squash")
    if crop is not None:
        return crop, crop[0] / shortest, "center"
    fraction = processor.get("crop_pct")
    if fraction is not None and shortest < _CONVNEXT_SQUASHES_FROM:
        return (shortest, shortest), float(fraction), "center"
    return (shortest, shortest), 1.0, "squash" if fraction is not None else "center"


def _size(value: Any) -> Size | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _labels(names: Any) -> tuple[str, ...]:
    """Return the class names in order; transformers' own LABEL_0, LABEL_1, ... are none."""
    if not isinstance(names, Mapping):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered
