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
    channels = vision.get("num_channels")
    mean, std = _normalisation(processor) if processor else (None, None)
    resample = processor.get("resample")
    return Facts(
        native_resolution=resolution or _size(vision.get("image_size")),
        mean=mean,
        std=std,
        interpolation=_RESAMPLE.get(2 if resample is None else int(resample)) if processor else None,
        crop_pct=crop_pct,
        crop_mode=mode,
        channels=None if channels is None else int(channels),
        labels=_labels(config.get("id2label")),
        task=task,
    )


def _normalisation(processor: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return the mean and std that do to pixels of 0..1 what the processor does to those of 0..255.

    It multiplies them by `rescale_factor`, takes 1 away (`rescale_offset`), normalises, and EfficientNet's then divides by the
    std once more (`include_top`).
    """
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if processor.get("do_normalize", "image_mean" in processor):
        if processor.get("image_mean") is None or processor.get("image_std") is None:
            return None, None
        mean, std = (tuple(float(value) for value in processor[key]) for key in ("image_mean", "image_std"))
        if processor.get("include_top", "EfficientNet" in str(processor.get("image_processor_type"))):
            std = tuple(value * value for value in std)
    factor = 255 * float(processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    return tuple((offset + value) / factor for value in mean), tuple(value / factor for value in std)


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
    fraction = processor.get("crop_pct")
    if crop is not None:  # PoolFormer resizes to what the fraction leaves of the size, and then crops
        return crop, crop[0] / shortest * float(fraction or 1), "center"
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


def _labels(names: Any) -> tuple[str, ...]:
    """Return the class names in order; transformers' own LABEL_0, LABEL_1, ... are none."""
    if not isinstance(names, Mapping):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered
