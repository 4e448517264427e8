"""What a network returns for one image goes in; a module that returns one tensor, or a tuple of them, comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.metrics.detection import BOXES, QUERIES

ANSWERS = ("out", *QUERIES, "logits", "image_embeds", "pooler_output")
"""Keys under which dictionaries hold the answer: torchvision's segmentation, transformers' heads and towers."""

_WANTED = (
    "rdeploy needs one tensor (1, classes) or (1, classes, H, W), or tensors with one row an image; "
    "wrap the network in a factory that returns it"
)


class Take(nn.Module):  # type: ignore[misc]
    """Return the tensors under some keys of a network that answers with a dictionary: one, or a tuple of them."""

    def __init__(self, module: nn.Module, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.output_names = keys

    def forward(self, images: torch.Tensor) -> Any:
        """Map images (N, C, H, W) to one tensor (N, ...) or a tuple of them."""
        answer = self.module(images)
        found = tuple(answer[key] for key in self.output_names)
        return found[0] if len(found) == 1 else found

    def extra_repr(self) -> str:
        """Return what the fingerprint of the module has to tell apart."""
        return ", ".join(self.output_names)


def plain(module: nn.Module, output: Any, name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return the module, wrapped where it answers with a dictionary, and its output tensors for one image.

    Raises:
        Unsupported: the output is something else, or holds rows whose number depends on the image.
    """
    if isinstance(output, Mapping):
        keys = tuple(key for key in ANSWERS if isinstance(output.get(key), torch.Tensor))[:1]
        if isinstance(output.get(BOXES), torch.Tensor):
            keys = (*keys, BOXES)
        keys = keys or tuple(str(key) for key, value in output.items() if isinstance(value, torch.Tensor))
        if keys:
            module, output = Take(module, keys), tuple(output[key] for key in keys)
    tensors = (output,) if isinstance(output, torch.Tensor) else output
    if isinstance(tensors, (tuple, list)) and tensors and isinstance(tensors[0], Mapping):
        raise Unsupported(
            f"{name} returns a list with a dictionary an image, whose number of rows depends on the image: an engine has "
            "outputs of one shape; wrap the network in a factory that returns its raw boxes and scores, before the "
            "suppression of overlapping ones"
        )
    if not isinstance(tensors, (tuple, list)) or not tensors or not all(map(_one_row, tensors)):
        raise Unsupported(f"{name} returns {_described(output)} for one image: {_WANTED}")
    return module, tuple(tensors)


def task_of(tensors: tuple[torch.Tensor, ...], name: str) -> str:
    """Return the task that the first output's shape tells.

    Raises:
        Unsupported: it tells none.
    """
    found = {2: "classification", 4: "segmentation"}.get(tensors[0].ndim)
    if found is None:
        raise Unsupported(
            f"{name} returns {_described(tensors[0])} for one image: {_WANTED}; for a detector's raw outputs say "
            "--task detection"
        )
    return found


def _one_row(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[0] == 1


def _described(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    found = f"a {type(output).__name__}"
    return found + f" of {len(output)}" if isinstance(output, (tuple, list, Mapping)) else found
