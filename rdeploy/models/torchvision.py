"""`torchvision:NAME` goes in; torchvision's network and the transforms of its weights come out."""

from __future__ import annotations

import inspect
import math
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlparse

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError, MissingDependency, Unsupported
from rdeploy.models import download
from rdeploy.models.network import Network, one_line
from rdeploy.models.spec import Facts
from rdeploy.plugins import did_you_mean


def build(name: str, options: LoadOptions, *, pretrained: bool, weights_file: str = "") -> Network:
    """Create `name` with its default weights, or with random ones.

    The preprocessing is that of the default weights, or of those whose own file is called `weights_file`.

    Raises:
        MissingDependency: torchvision is not installed.
        ConfigError: there is no such model, it does not take the `--arch-kwargs`, or its weights are out of reach.
        Unsupported: it is no classification or segmentation network.
    """
    try:
        import torchvision
    except ImportError as error:
        raise MissingDependency("torchvision is not installed", install="pip install 'rdeploy[zoo]'") from error

    models = torchvision.models
    _check_name(models, name)
    arguments = dict(options.arch_kwargs)
    entries = list(models.get_model_weights(name))
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    try:
        if pretrained:
            if default is None:
                raise Unsupported(f"torchvision has no weights for {name}: {download.advice('torchvision', name)}")
            with download.guarded("torchvision", name, url=default.url, offline=options.offline):
                module = models.get_model(name, weights=default, **arguments)
        else:
            module = models.get_model(name, **_without_weights(models, name), **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"torchvision cannot build {name}: {one_line(error)}") from error
    ours = next((entry for entry in entries if PurePosixPath(urlparse(entry.url).path).name == weights_file), default)
    return Network(module=module, name=name, facts=_facts(ours, name))


def _check_name(models: Any, name: str) -> None:
    supported = {*models.list_models(module=models), *models.list_models(module=models.segmentation)}
    if name in supported:
        return
    if name in models.list_models():
        raise Unsupported(
            f"torchvision:{name} is no floating-point classification or segmentation network; these are supported"
        )
    raise ConfigError(f"torchvision has no model {name!r}{did_you_mean(name, sorted(supported))}")


def _without_weights(models: Any, name: str) -> dict[str, Any]:
    """Return the arguments that keep a builder from downloading, or from minutes of truncated-normal initialisation."""
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
        # Their pretrained versions are built with it, and normalise inside the network.
        arguments["transform_input"] = True
    return arguments


def _facts(weights: Any, name: str) -> Facts:
    if weights is None:
        return Facts()
    transforms = weights.transforms()
    crop = getattr(transforms, "crop_size", None)
    resize = transforms.resize_size[0]
    crop = crop[0] if crop else resize
    segments = not hasattr(transforms, "crop_size")
    return Facts(
        native_resolution=(crop, crop),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        crop_pct=_crop_pct(crop, resize),
        channels=3,
        labels=tuple(weights.meta.get("categories", ())),
        # Their shorter side becomes 520 and the longer one what it may: an engine has one size, and sees all of the image.
        crop_mode="squash" if segments else "center",
        task="segmentation" if segments else None,
    )


def _crop_pct(crop: int, resize: int) -> float:
    """Return crop / resize such that `floor(crop / pct)` is `resize` again in floating point."""
    ratio = crop / resize
    return ratio if math.floor(crop / ratio) == resize else math.nextafter(ratio, 0)
