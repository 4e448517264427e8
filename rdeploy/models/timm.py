"""`timm:NAME` goes in; timm's network with its pretrained (or random) weights and its own configuration comes out."""

from __future__ import annotations

import functools
from typing import Any

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError, MissingDependency, Unsupported
from rdeploy.models import download
from rdeploy.models.network import Network, one_line, reparameterized
from rdeploy.models.spec import Facts
from rdeploy.plugins import did_you_mean
from rdeploy.types import CROP_MODES, Size


def build(name: str, options: LoadOptions, *, pretrained: bool) -> Network:
    """Create `name` (with timm's tag or without: `resnet18`, `resnet18.a1_in1k`).

    Raises:
        MissingDependency: timm is not installed.
        ConfigError: there is no such model or tag, it does not take the `--arch-kwargs`, or its weights are not there.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingDependency("timm is not installed", install="pip install 'rdeploy[zoo]'") from error

    _check_name(timm, name)
    arguments = dict(options.arch_kwargs)
    try:
        if pretrained:
            config = timm.models.get_pretrained_cfg(name)
            hub, url = (getattr(config, "hf_hub_id", None), getattr(config, "url", None)) if config else (None, None)
            if not hub and not url:
                raise Unsupported(f"timm has no pretrained weights for {name}: {download.advice('timm', name)}")
            with download.guarded("timm", name, url=None if hub else url, offline=options.offline):
                module = timm.create_model(name, pretrained=True, **arguments)
        else:
            module = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise ConfigError(f"timm cannot build {name}{_with(arguments)}: {one_line(error)}") from error
    module.made_at = functools.partial(_made_at, name, arguments)
    return Network(module=module, name=name, facts=facts_of(module, arguments))


def _made_at(name: str, arguments: dict[str, Any], resolution: Size) -> Any:
    """Return the same network for another image size (h, w), with random weights: some cannot change theirs later."""
    import timm

    size = resolution[0] if resolution[0] == resolution[1] else resolution
    return reparameterized(timm.create_model(name, pretrained=False, **{**arguments, "img_size": size}).eval())


def facts_of(module: Any, arguments: dict[str, Any] | None = None) -> Facts:
    """Read a timm-style `pretrained_cfg` (or `default_cfg`) attribute; no facts when there is none.

    Raises:
        ConfigError: the attribute is no mapping, or its input_size is not (channels, height, width).
    """
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not hasattr(config, "get"):
        raise ConfigError(f"pretrained_cfg of {type(module).__name__} must be a dict, not {type(config).__name__}")
    arguments = arguments or {}
    size = config.get("input_size")
    if size is not None and (not isinstance(size, (tuple, list)) or len(size) != 3):
        raise ConfigError(f"pretrained_cfg input_size must be (channels, height, width), not {size!r}")
    resolution = None if size is None else (int(size[1]), int(size[2]))
    if image_size := arguments.get("img_size"):
        resolution = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    channels = arguments.get("in_chans") or (size[0] if size else None)
    mode = config.get("crop_mode")
    return Facts(
        native_resolution=resolution,
        mean=_floats(config.get("mean")),
        std=_floats(config.get("std")),
        interpolation=_interpolation(config.get("interpolation")),
        crop_pct=config.get("crop_pct"),
        channels=None if channels is None else int(channels),
        labels=tuple(config.get("label_names") or ()) or _imagenet_labels(module, config),
        task="embedding" if getattr(module, "num_classes", None) == 0 else None,
        crop_mode=mode if mode in CROP_MODES else None,
        assumed=("crop_mode",) if mode not in (None, *CROP_MODES) else (),
    )


def _check_name(timm: Any, name: str) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ConfigError(f"timm has no model {base!r}{did_you_mean(base, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise ConfigError(
            f"timm has no weights {tag!r} for {base}{did_you_mean(tag, tags)}; there are: {', '.join(tags)}"
        )


def _floats(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _interpolation(name: Any) -> str | None:
    # "random" is a training augmentation; timm evaluates such models with bicubic.
    return None if name in (None, "", "random") else str(name)


def _imagenet_labels(module: Any, config: Any) -> tuple[str, ...]:
    """Return ImageNet-1k's names for a network with these 1000 classes; timm's configurations do not carry them."""
    if getattr(module, "num_classes", None) != 1000 or "timm" not in type(module).__module__.split("."):
        return ()
    if config.get("num_classes", 1000) != 1000:
        return ()
    from timm.data import ImageNetInfo

    return tuple(str(name) for name in ImageNetInfo("imagenet-1k").label_descriptions())


def _with(arguments: dict[str, Any]) -> str:
    return " with " + ", ".join(f"{key}={value!r}" for key, value in arguments.items()) if arguments else ""
