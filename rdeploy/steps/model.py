"""A model whose facts are known; its module is loaded when a step has to work with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdeploy import resize
from rdeploy.models import Loaded
from rdeploy.types import ModelSpec


class LazyModel:
    """A model whose facts are known and whose module is loaded when a step has to work with it."""

    def __init__(self, spec: ModelSpec, onnx: Path | None, load: Callable[[], Loaded]) -> None:
        self.spec, self.onnx = spec, onnx
        self._load = load
        self._module: Any = None
        self._resized: dict[tuple[resize.Place, ...], Any] = {}

    @property
    def module(self) -> Any:
        """The PyTorch module, loaded once; None where the model is an ONNX file."""
        if self._module is None and self.onnx is None:
            self._module = self._load().module
        return self._module

    def resized(self, places: tuple[resize.Place, ...]) -> Any:
        """Return the module reduced at these places; the last one is kept, since several steps need it."""
        if places not in self._resized:
            self._resized = {places: resize.apply(self.module, self.spec, places)}
        return self._resized[places]
