"""A network and what its source knows of it go in; the checked module and its `ModelSpec` come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError, Unsupported
from rdeploy.models import answers
from rdeploy.models.fingerprint import fingerprint
from rdeploy.models.spec import Facts, make_spec
from rdeploy.types import ModelSpec, Size


@dataclass(frozen=True, kw_only=True)
class Network:
    """A module as its format's loader found it, not yet checked."""

    module: nn.Module
    name: str
    facts: Facts


def finish(network: Network, source: str, options: LoadOptions) -> tuple[nn.Module, ModelSpec]:
    """Return the module in eval mode, one tensor in and one (or a tuple of them) out, and its specification.

    Raises:
        ConfigError: it cannot run at its native resolution, or an option does not fit it.
        Unsupported: its output is nothing that rdeploy knows.
    """
    module = reparameterized(in_eval_mode(network.module.cpu()))
    facts = network.facts
    resolution = options.native_resolution or facts.native_resolution or (224, 224)
    answer, channels = _probe(module, network.name, resolution, facts.channels)
    facts = replace(facts, channels=channels)
    module, tensors = answers.plain(module, answer, network.name)
    task = options.task or facts.task or answers.task_of(tensors, network.name)
    _check_shape(tensors, task, network.name)
    classes = tensors[0].shape[1] if tensors[0].ndim in (2, 4) else 0
    if len(facts.labels) != classes and task != "detection":
        facts = replace(facts, labels=())
    spec = make_spec(network.name, facts, options, source=source, task=task, sha256=fingerprint(module))
    return module, spec


_RANKS = {"classification": (2,), "segmentation": (4,), "embedding": (2, 4), "detection": (2, 3)}


def _check_shape(tensors: tuple[torch.Tensor, ...], task: str, name: str) -> None:
    """Check that the first output can be the answer of the task."""
    shape = tuple(tensors[0].shape)
    if task in _RANKS and len(shape) not in _RANKS[task]:
        wanted = " or ".join(_SHAPES[rank] for rank in _RANKS[task])
        raise Unsupported(
            f"{name} returns a tensor of shape {shape} for one image, but {task} needs {wanted}: wrap the network in a "
            "factory that returns it, or say another --task"
        )


_SHAPES = {2: "(1, features)", 3: "(1, rows, columns)", 4: "(1, channels, H, W)"}


def reparameterized(module: nn.Module) -> nn.Module:
    """Return timm's networks of several branches with the branches folded into one, as they are meant to be deployed.

    FastViT, MobileOne, RepVGG, RepViT and others: the same function in eval mode, and fewer layers.
    """
    if not any(type(part).__module__.split(".", 1)[0] == "timm" and _folds(part) for part in module.modules()):
        return module
    from timm.utils import reparameterize_model

    folded: nn.Module = reparameterize_model(module)
    return folded.eval()


def _folds(part: nn.Module) -> bool:
    return any(callable(getattr(part, name, None)) for name in ("fuse", "reparameterize", "switch_to_deploy"))


def in_eval_mode(module: nn.Module) -> nn.Module:
    """Return the module, switched to eval mode; a graph from `torch.export` is left as it is: its mode is baked in."""
    if isinstance(module, torch.fx.GraphModule) and not isinstance(module, torch.jit.ScriptModule):
        try:
            return module.eval()
        except NotImplementedError:
            return module
    return module.eval()


def _probe(module: nn.Module, name: str, resolution: Size, channels: int | None) -> tuple[Any, int]:
    """Run the module once on zeros (1, C, H, W), in the dtype of its weights; return its answer and C.

    C is what its configuration says, else what its first convolution takes. timm's configuration still says 3 in a
    factory that asked for other channels: where that does not run, the convolution is believed.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    first = _first_channels(module)
    known = [count for count in dict.fromkeys((channels, first)) if count] or [3]
    failures = []
    for count in known:
        try:
            with torch.no_grad():
                return module(torch.zeros(1, count, *resolution, dtype=dtype)), count
        except Exception as error:  # noqa: BLE001 - a user's module raises anything
            failures.append(error)
    shape = f"1x{known[0]}x{resolution[0]}x{resolution[1]}"
    raise ConfigError(
        f"{name} does not run on an input of {shape}: {one_line(failures[0])}; set its own size with --native-resolution"
    ) from failures[0]


def _first_channels(module: nn.Module) -> int | None:
    return next((int(m.in_channels) for m in module.modules() if isinstance(m, nn.Conv2d)), None)


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """Return `Type: message` on one line, cut at `limit` characters."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
