"""PyTorch with `torch.compile`: the program of `torch`, compiled for this machine when it first runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rdeploy import hardware
from rdeploy.backends import torch
from rdeploy.measured import LayerTimes
from rdeploy.types import Engine, Target

INSTALL, FLOATS, NEEDS_MODULE = torch.INSTALL, torch.FLOATS, torch.NEEDS_MODULE
version, scheme, load_runtime = torch.version, torch.scheme, torch.load_runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`torch.compile` is called as most call it, with its defaults."""


def unavailable() -> str | None:
    if (reason := torch.unavailable()) is not None:
        return reason
    if not hardware.gpus() and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return (
            "torch.compile needs a C++ compiler on a machine without a GPU, and there is none here: apt-get install g++"
        )
    return None


def build_engine(onnx: Path, directory: Path, *, target: Target, options: Any) -> Engine:
    """Copy the program to `directory/torch_compile.pt2`; see `torch.build_engine`. It is compiled where it runs."""
    return torch.build_engine(onnx, directory, target=target, options=options, name="torch_compile")


def cannot_run(engine: Engine) -> str | None:
    return unavailable()


def open_session(path: Path, *, threads: int | None = None) -> torch.Session:
    return torch.Session(path, threads=threads, compiled=True)


def layer_times(
    path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 30
) -> LayerTimes:
    """Return the kernels' mean times from PyTorch's profiler; `torch.compile` names them after what it fused."""
    return torch.layer_times(path, inputs, threads=threads, runs=runs, compiled=True)
