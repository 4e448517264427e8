"""A file of weights and the name of its architecture go in; the architecture with these weights comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.models import architecture, checkpoint, content
from rdeploy.models.network import Network, one_line
from rdeploy.models.timm import facts_of

WRAPPERS = (
    "model_ema",
    "state_dict_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
)
"""Where training scripts put the state dict in what they save; averaged weights first, as timm prefers them."""

_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3

StateDict = dict[str, torch.Tensor]


def load(path: Path, kind: str, options: LoadOptions) -> Network:
    """Read `.pt`, `.pth` or `.safetensors`; a pickled module needs `options.trust_pickle`, a state dict `options.arch`.

    Raises:
        ConfigError: the file or its keys do not fit.
    """
    found = (
        _read_safetensors(path)
        if kind == content.SAFETENSORS
        else checkpoint.read(path, trust_pickle=options.trust_pickle)
    )
    found = _unwrap(found)
    if isinstance(found, nn.Module):
        if options.arch is not None:
            raise ConfigError(f"{path} holds a whole {type(found).__name__}, not a state dict: drop --arch")
        return Network(module=found.float(), name=path.stem, facts=facts_of(found))
    state = _state_dict(found, path)
    if options.arch is None:
        raise ConfigError(
            f"{path} holds weights without their network ({len(state)} tensors, the first is {next(iter(state))!r}): "
            f"name it with --arch {architecture.FORMS}"
        )
    network = architecture.build(options.arch, options, pretrained=False, weights_file=path.name)
    fill(network.module, state, where=f"{path} does not fit --arch {options.arch}")
    return Network(module=network.module, name=path.stem, facts=network.facts)


def fill(module: nn.Module, state: StateDict, *, where: str) -> None:
    """Load the weights into the module, all of them.

    Raises:
        ConfigError: keys are missing, unexpected or of another shape; the message says which and how many.
    """
    expected = module.state_dict()
    state = _without_prefix(state, expected)
    missing = [k for k in expected if k not in state and not k.endswith(("num_batches_tracked", "_extra_state"))]
    unexpected = [k for k in state if k not in expected]
    misshaped = [k for k in state if k in expected and state[k].shape != _shape(expected[k])]
    if missing or unexpected or misshaped:
        shown = [f"{k} is {_text(state[k])} where {_text(expected[k])} belongs" for k in misshaped[:_SHOWN]]
        parts = [
            *_listed("missing", missing, missing),
            *_listed("unexpected", unexpected, unexpected),
            *_listed("misshaped", misshaped, shown),
        ]
        raise ConfigError(f"{where}: {'; '.join(parts)}{_hint(state, expected, misshaped)}")
    try:
        module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def _read_safetensors(path: Path) -> StateDict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependency("safetensors is not installed", install="pip install safetensors") from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {one_line(error)}") from error


def _unwrap(found: Any) -> Any:
    """Take the weights (or the module) out of the dictionary that a training script saved."""
    for _ in range(3):
        if not isinstance(found, Mapping):
            break
        key = next((k for k in WRAPPERS if _is_inner(found.get(k))), None)
        if key is None:
            break
        found = found[key]
    return found


def _is_inner(value: Any) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, Mapping) and len(value) > 0)


def _state_dict(found: Any, path: Path) -> StateDict:
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} is not a model: it holds a {type(found).__name__}, no state dict")
    state = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if not state:
        keys = ", ".join(repr(key) for key in list(found)[:_SHOWN]) or "nothing"
        raise ConfigError(f"{path} is not a model: its dictionary holds no tensors (keys: {keys})")
    return state


def _without_prefix(state: StateDict, expected: Mapping[str, Any]) -> StateDict:
    """Strip what wrappers put before every key (DataParallel, torch.compile, Lightning) and the network has not."""
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in expected):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, torch.Tensor) else torch.Size()


def _text(value: Any) -> str:
    return "x".join(str(side) for side in _shape(value)) or "a scalar"


def _listed(word: str, keys: list[str], shown: list[str]) -> list[str]:
    if not keys:
        return []
    more = ", ..." if len(keys) > _SHOWN else ""
    return [f"{len(keys)} {word} ({', '.join(shown[:_SHOWN])}{more})"]


def _hint(state: StateDict, expected: Mapping[str, Any], misshaped: list[str]) -> str:
    """Where only the number of classes differs, say how to set it."""
    sizes = {(state[k].shape[:1], _shape(expected[k])[:1]) for k in misshaped if state[k].ndim}
    if not misshaped or len(sizes) != 1 or any(state[k].shape[1:] != _shape(expected[k])[1:] for k in misshaped):
        return ""
    return f"; for another number of classes pass --arch-kwargs num_classes={state[misshaped[0]].shape[0]}"
