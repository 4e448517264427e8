"""The name of an architecture goes in (`timm:`, `torchvision:`, `package.module:factory`); the network comes out."""

from __future__ import annotations

import torch

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError
from rdeploy.models import content, factory
from rdeploy.models.network import Network

FORMS = "timm:NAME, torchvision:NAME, hf:NAME or package.module:factory"


def build(source: str, options: LoadOptions, *, pretrained: bool, weights_file: str = "") -> Network:
    """Build the named network; random weights are seeded. `weights_file` is the name of the file that will fill it.

    Raises:
        ConfigError: there is no such architecture.
        Unsupported: it is a network of a kind that rdeploy cannot take.
    """
    family, _, name = source.partition(":")
    torch.manual_seed(options.seed)
    if family == "hf":
        from rdeploy.models import hf

        return hf.build(name, options, pretrained=pretrained)
    if family == "timm":
        from rdeploy.models import timm

        return timm.build(name, options, pretrained=pretrained)
    if family == "torchvision":
        from rdeploy.models import torchvision

        return torchvision.build(name, options, pretrained=pretrained, weights_file=weights_file)
    if not content.is_factory(source):
        raise ConfigError(f"{source!r} names no architecture: give {FORMS}")
    return factory.build(source, options)
