"""What a network and its modules are called in messages and by users."""

from __future__ import annotations

import traceback

from torch import nn


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """Return the network inside what takes the logits out of its answer, and what its modules' names begin with there."""
    prefix = ""
    while True:
        name = next((one for one in ("module", "model") if isinstance(getattr(module, one, None), nn.Module)), None)
        if name is None:
            return module, prefix
        module, prefix = getattr(module, name), f"{prefix}{name}."


def plain_name(module: nn.Module) -> str:
    """Return the class of the network itself: a wrapper says nothing to a user."""
    return type(unwrapped(module)[0]).__name__


def reason_of(error: Exception) -> str:
    """Return what an error of a network's own code says; where it says nothing, which of its checks failed."""
    if text := " ".join(str(error).split()):
        return text[:160]
    frames = [
        one for one in traceback.extract_tb(error.__traceback__) if "/torch/" not in one.filename.replace("\\", "/")
    ]
    line = frames[-1].line if frames else None
    return f"a check of its own fails there, {line}" if line else type(error).__name__
