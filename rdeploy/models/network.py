"""A network and what its source knows of it go in; the checked module and its `ModelSpec` come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rdeploy.errors import ConfigError, Unsupported
from rdeploy.models.fingerprint import fingerprint
from rdeploy.models.spec import Facts, make_spec
from rdeploy.types import LoadOptions, ModelSpec, Size


@dataclass(frozen=True, kw_only=True)
class Network:
    """A module as its format's loader found it, not yet checked."""

    module: nn.Module
    name: str
    facts: Facts


def finish(network: Network, source: str, options: LoadOptions) -> tuple[nn.Module, ModelSpec]:
    """Return the module in eval mode, one tensor in and one out, and its specification.

    Raises:
        ConfigError: it cannot run at its native resolution, or an option does not fit it.
        Unsupported: its output is not one tensor that rdeploy knows.
    """
    module = in_eval_mode(network.module.cpu())
    facts = network.facts
    channels = facts.channels or _first_channels(module) or 3
    facts = replace(facts, channels=channels)
    resolution = options.native_resolution or facts.native_resolution or (224, 224)
    output = _probe(module, network.name, resolution, channels)
    if isinstance(output, dict) and "out" in output:
        module, output = TakeOut(module), output["out"]
    task = options.task or facts.task or _task_of(output, network.name)
    classes = output.shape[1] if isinstance(output, torch.Tensor) and output.ndim in (2, 4) else 0
    if len(facts.labels) != classes:
        facts = replace(facts, labels=())
    if not isinstance(output, torch.Tensor):
        _task_of(output, network.name)
    spec = make_spec(network.name, facts, options, source=source, task=task, sha256=fingerprint(module))
    return module, spec


class TakeOut(nn.Module):  # type: ignore[misc]
    """Return the tensor `out` of a network that answers with a dictionary, as torchvision's segmentation models do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to scores (N, classes, H, W)."""
        scores: torch.Tensor = self.module(images)["out"]
        return scores


def in_eval_mode(module: nn.Module) -> nn.Module:
    """Return the module, switched to eval mode; a graph from `torch.export` is left as it is: its mode is baked in."""
    if isinstance(module, torch.fx.GraphModule) and not isinstance(module, torch.jit.ScriptModule):
        try:
            return module.eval()
        except NotImplementedError:
            return module
    return module.eval()


def _probe(module: nn.Module, name: str, resolution: Size, channels: int) -> Any:
    """Run the module once on zeros (1, C, H, W), in the dtype of its weights."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            return module(torch.zeros(1, channels, *resolution, dtype=dtype))
    except Exception as error:
        shape = f"1x{channels}x{resolution[0]}x{resolution[1]}"
        raise ConfigError(
            f"{name} does not run on an input of {shape}: {one_line(error)}; set its own size with --native-resolution"
        ) from error


def _task_of(output: Any, name: str) -> str:
    if isinstance(output, torch.Tensor) and output.shape[:1] == (1,):
        if output.ndim == 2:
            return "classification"
        if output.ndim == 4:
            return "segmentation"
    if isinstance(output, torch.Tensor):
        found = f"a tensor of shape {tuple(output.shape)}"
    else:
        found = f"a {type(output).__name__}"
        found += f" of {len(output)}" if isinstance(output, (tuple, list, dict)) else ""
    raise Unsupported(
        f"{name} returns {found} for one image: rdeploy needs one tensor (1, classes) or (1, classes, H, W); "
        "wrap the network in a factory that returns it"
    )


def _first_channels(module: nn.Module) -> int | None:
    return next((int(m.in_channels) for m in module.modules() if isinstance(m, nn.Conv2d)), None)


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """Return `Type: message` on one line, cut at `limit` characters."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
