"""A file that `torch.save` wrote goes in; what it holds comes out, without running any code unless that was allowed."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rdeploy.errors import ConfigError
from rdeploy.models.factory import importable_here
from rdeploy.models.network import one_line
from rdeploy.pt2 import refused_global


def read(path: Path, *, trust_pickle: bool) -> Any:
    """Load a checkpoint on the CPU with PyTorch's unpickler for tensors and plain containers only.

    With `trust_pickle` the file may run any code it likes; the current directory is importable then.

    Raises:
        ConfigError: it needs code and that was not allowed (the message names the first global), or it is damaged.
    """
    if trust_pickle:
        return _read_trusted(path)
    try:
        # An open file: given a path, PyTorch goes by its suffix.
        with path.open("rb") as file, warnings.catch_warnings():
            # About the pickle's protocol, or deprecated storages: nothing that the user of a file can act on.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := refused_global(error):
            raise ConfigError(refusal(path, wanted)) from error
        raise ConfigError(_damaged(path, error)) from error
    except _DAMAGE as error:
        raise ConfigError(_damaged(path, error)) from error


def refusal(path: Path, wanted: str) -> str:
    """Return why a file that needs pickle is not opened, and what to do."""
    return (
        f"{path} needs pickle to run {wanted}, and a pickle can run any code: refused; save the state dict alone "
        "(torch.save(model.state_dict(), ...)) and name the network with --arch, or pass --trust-pickle if you trust it"
    )


def _read_trusted(path: Path) -> Any:
    with importable_here():
        try:
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=False)
        except (AttributeError, ImportError) as error:
            raise ConfigError(
                f"{path} names a class that is not here: {one_line(error)}; "
                "install its package, or start in the folder that holds its code"
            ) from error
        except Exception as error:
            raise ConfigError(_damaged(path, error)) from error


_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OSError,
    zipfile.BadZipFile,
)


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged, cut off, or no PyTorch checkpoint: {one_line(error, limit=120)}"
