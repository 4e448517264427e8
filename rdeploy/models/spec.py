"""What a source knows of its network, and the user's options, go in; the `ModelSpec` comes out. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError
from rdeploy.plugins import did_you_mean
from rdeploy.types import INTERPOLATIONS, TASKS, ModelSpec, Preprocessing, Size

WHOLE_IMAGE = ("segmentation", "detection")
"""Tasks whose answer is about every part of the image: nothing of it may be cut off."""
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an architecture; None (or nothing) where its source does not say."""

    native_resolution: Size | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    channels: int | None = None
    labels: tuple[str, ...] = ()
    task: str | None = None
    assumed: tuple[str, ...] = ()


def make_spec(name: str, facts: Facts, options: LoadOptions, *, source: str, task: str, sha256: str) -> ModelSpec:
    """Combine options, facts and ImageNet's defaults, in this order; what was a default is listed in `assumed`.

    Raises:
        ConfigError: an option does not fit the model.
    """
    assumed = list(facts.assumed)

    def choose(field: str, default: Any) -> Any:
        value = getattr(options, field)
        value = getattr(facts, field) if value is None else value
        if value is None:
            assumed.append(field)
        return default if value is None else value

    channels = facts.channels or 3
    preprocessing = Preprocessing(
        mean=_per_channel("mean", choose("mean", _IMAGENET_MEAN), channels, given=options.mean is not None),
        std=_per_channel("std", choose("std", _IMAGENET_STD), channels, given=options.std is not None),
        interpolation=str(choose("interpolation", "bicubic")).lower(),
        crop_pct=float(choose("crop_pct", 1.0 if task in WHOLE_IMAGE else 0.875)),
        crop_mode=options.crop_mode or facts.crop_mode or ("squash" if task in WHOLE_IMAGE else "center"),
    )
    resolution = choose("native_resolution", (224, 224))
    _check(preprocessing, resolution, task)
    return ModelSpec(
        name=re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model",
        source=source,
        sha256=sha256,
        native_resolution=(int(resolution[0]), int(resolution[1])),
        preprocessing=preprocessing,
        task=task,
        channels=channels,
        labels=facts.labels,
        assumed=tuple(dict.fromkeys(assumed)),
    )


def _per_channel(name: str, values: Any, channels: int, *, given: bool) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) == 1:
        return numbers * channels
    if len(numbers) == channels:
        return numbers
    if given:
        raise ConfigError(f"--{name} has {len(numbers)} values, but the model takes {channels} channels")
    # ImageNet's three values for a network that takes another number of channels (a grey-level one, usually).
    return (sum(numbers) / len(numbers),) * channels


def _check(preprocessing: Preprocessing, resolution: Any, task: str) -> None:
    if not all(math.isfinite(value) for value in (*preprocessing.mean, *preprocessing.std)):
        raise ConfigError("--mean and --std must be finite numbers")
    if min(preprocessing.std) <= 0:
        raise ConfigError(f"--std must be positive, not {min(preprocessing.std)}")
    if not 0 < preprocessing.crop_pct <= 1:
        raise ConfigError(f"--crop-pct must be over 0 and at most 1, not {preprocessing.crop_pct}")
    if len(resolution) != 2 or min(resolution) < 1:
        raise ConfigError(f"--native-resolution must be two positive sizes (h, w), not {resolution}")
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; there are: {', '.join(TASKS)}")
    if preprocessing.interpolation not in INTERPOLATIONS:
        close = did_you_mean(preprocessing.interpolation, INTERPOLATIONS)
        known = ", ".join(INTERPOLATIONS)
        raise ConfigError(f"unknown interpolation {preprocessing.interpolation!r}{close}; there are: {known}")
