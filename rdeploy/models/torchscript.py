"""A TorchScript archive goes in; its module comes out."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from rdeploy.errors import ConfigError
from rdeploy.models.network import Network, one_line
from rdeploy.models.spec import Facts


def load(path: Path) -> Network:
    """Load on the CPU. TorchScript is its own small language: opening an archive runs no Python.

    Raises:
        ConfigError: the archive is damaged, or needs operators that are not here.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch deprecates the format; who has such a file cannot act on that here.
            warnings.simplefilter("ignore", FutureWarning)
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be loaded as TorchScript: {one_line(error)}") from error
    return Network(module=module, name=path.stem, facts=Facts())
