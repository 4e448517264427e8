"""A model whose facts are known; its module is loaded when a step has to work with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        self._resized: dict[tuple[tuple[resize.Place, ...], Path | None], Any] = {}

    @property
    def module(self) -> Any:
        """The PyTorch module, loaded once; None where the model is an ONNX file."""
        if self._module is None and self.onnx is None:
            self._module = self._load().module
        return self._module

    def answers(self) -> int:
        """Return how many numbers its (first) output has for one image; the module runs once."""
        import torch

        weight = next(self.module.parameters(), torch.zeros(1))
        with torch.no_grad():
            output = self.module(torch.zeros(1, self.spec.channels, *self.spec.native_resolution, dtype=weight.dtype))
        return int((output if isinstance(output, torch.Tensor) else output[0]).shape[1])

    def resized(self, places: tuple[resize.Place, ...], weights: Path | None = None) -> Any:
        """Return the module reduced at these places, with the weights of a file where one is named.

        The last one is kept, since several steps need it.
        """
        if (places, weights) not in self._resized:
            made = resize.apply(self.module, self.spec, places)
            if weights is not None:
                import torch

                fill(made, torch.load(weights, map_location="cpu", weights_only=True))
            self._resized = {(places, weights): made}
        return self._resized[places, weights]


def fill(module: Any, state: Mapping[str, Any]) -> None:
    """Load weights into a module, and let it forget what it computed of those before (timm's LeViT keeps its tables)."""
    module.load_state_dict(state)
    for part in module.modules():
        if getattr(part, "attention_bias_cache", None):
            part.attention_bias_cache = {}
