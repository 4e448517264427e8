"""A `.pt2` file of `torch.export.save` goes in; its module comes out, after a check that opening it runs no code."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rdeploy.errors import ConfigError
from rdeploy.models.network import Network, one_line
from rdeploy.models.spec import Facts
from rdeploy.pt2 import check_safe

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load(path: Path, *, trust_pickle: bool) -> Network:
    """Load an exported program; its native resolution is the size it was exported with.

    Raises:
        ConfigError: it is damaged or for another PyTorch, or opening it could run code and `trust_pickle` is not set.
    """
    try:
        if not trust_pickle:
            check_safe(path)
        with path.open("rb") as file, _weights_only(not trust_pickle), _quiet():
            program = torch.export.load(file)
        module = program.module()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be loaded as an exported program: {one_line(error)}") from error
    shape = _input_shape(program)
    size = (shape[2], shape[3]) if shape is not None and len(shape) == 4 else None
    facts = Facts(native_resolution=size, channels=None if size is None or shape is None else shape[1])
    return Network(module=module, name=path.stem, facts=facts)


@contextlib.contextmanager
def _weights_only(active: bool) -> Iterator[None]:
    """Make every `torch.load` inside PyTorch refuse code, by its own switch: the second lock behind `check_safe`."""
    before = os.environ.get(_FORCE)
    if active:
        os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_FORCE, None)
        else:
            os.environ[_FORCE] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep `torch.export.load` from logging a traceback for a file that is then refused in one sentence."""
    logger = logging.getLogger("torch.export")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _input_shape(program: Any) -> tuple[int, ...] | None:
    """Return the example shape of the only input, a dynamic dimension by its hint."""
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    value = nodes[0].meta.get("val") if len(nodes) == 1 else None
    if value is None:
        return None
    # `int` of a backed symbolic size gives its hint, and would add a guard: ask the hint itself.
    return tuple(side if isinstance(side, int) else int(side.node.hint) for side in value.shape)
