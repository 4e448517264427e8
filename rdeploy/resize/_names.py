"""What a network is called in messages."""

from __future__ import annotations

from torch import nn


def plain_name(module: nn.Module) -> str:
    """Return the class of the network itself: what takes the logits out of an answer says nothing to a user."""
    while isinstance(inner := getattr(module, "module", getattr(module, "model", None)), nn.Module):
        module = inner
    return type(module).__name__
