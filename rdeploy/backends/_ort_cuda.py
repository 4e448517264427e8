"""CUDA's and cuDNN's libraries from pip's `nvidia-*` wheels, loaded before ONNX Runtime looks for them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any


def preload(ort: Any) -> str:
    """Load what ONNX Runtime's CUDA provider links; return what could not be loaded, in its words, "" where all is there.

    By itself ONNX Runtime looks in the system's folders alone, and its `preload_dlls` (1.21 and later) beside its own package:
    wheels that lie in another folder of `sys.path`, as PyTorch's may, are tried before.
    """
    load = getattr(ort, "preload_dlls", None)
    if load is None:
        return ""
    with contextlib.redirect_stdout(io.StringIO()):
        for folder in _library_folders():
            load(directory=str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints, and stdout is for data
        load()
    return "; ".join(line for line in said.getvalue().splitlines() if line.startswith("Failed to load"))


def _library_folders() -> list[Path]:
    """Return the folders of libraries in the `nvidia` packages, cuDNN's behind those of CUDA, which it needs."""
    found = importlib.util.find_spec("nvidia")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    folders = [folder for place in places for folder in Path(place).glob("*/lib") if folder.is_dir()]
    return sorted(folders, key=lambda folder: (folder.parent.name == "cudnn", folder))
