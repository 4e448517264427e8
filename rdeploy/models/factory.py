"""`package.module:factory` goes in; the `nn.Module` that the callable returns comes out."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rdeploy.build_request import LoadOptions
from rdeploy.errors import ConfigError
from rdeploy.models import timm
from rdeploy.models.network import Network, one_line
from rdeploy.plugins import did_you_mean


def build(name: str, options: LoadOptions) -> Network:
    """Import the module (the current directory counts, as with `python -m`) and call the factory with `--arch-kwargs`.

    A `pretrained_cfg` or `default_cfg` attribute of what it returns is read as timm's.

    Raises:
        ConfigError: it cannot be imported or called, raises, or returns no `nn.Module`.
    """
    arguments = dict(options.arch_kwargs)
    with importable_here():
        factory = _find(name)
        try:
            module = factory(**arguments)
        except Exception as error:
            raise ConfigError(f"{name} raised {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name} must return a torch.nn.Module, not {type(module).__name__}")
    return Network(module=module, name=name.rsplit(":", 1)[1].rsplit(".", 1)[-1], facts=timm.facts_of(module))


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """Let the block import from the current directory."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _find(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"no module {error.name!r} for {name}: it is neither installed nor in the current folder {Path.cwd()}"
            ) from error
        raise ConfigError(f"importing {module_name} failed: {one_line(error)}") from error
    except Exception as error:
        raise ConfigError(f"importing {module_name} failed: {one_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [known for known in dir(found) if not known.startswith("_")]
            raise ConfigError(f"{module_name} has no {part!r}{did_you_mean(part, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"{name} is not callable: it is a {type(found).__name__}; name a function that returns the model"
        )
    return found  # type: ignore[no-any-return]
