"""A module goes in; a sha256 over all that decides what it computes comes out: weights, structure, its own source."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

_INSTALLED = ("site-packages", "dist-packages")


def fingerprint(module: nn.Module) -> str:
    """Return a sha256 that changes with any weight or buffer, with a layer's settings, or with an edited forward().

    Classes of installed packages count by name and version; others by the text of the file they are defined in.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(module):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_content(tensor))
    # Addresses in a repr differ from run to run.
    digest.update(re.sub(r"0x[0-9a-fA-F]+", "0x", repr(module)).encode())
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        digest.update(str(module.code).encode())
    for line in sorted({_class_line(type(child)) for child in module.modules()}):
        digest.update(line.encode())
    return digest.hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, also those that a state dict leaves out, by name."""
    seen = dict(module.named_parameters(remove_duplicate=False))
    seen.update(module.named_buffers(remove_duplicate=False))
    for name in sorted(seen):
        yield name, seen[name].detach()


def _content(tensor: torch.Tensor) -> bytes | memoryview:
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return repr(tensor).encode()
    if tensor.numel() == 0:
        return b""
    content: memoryview = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


def _class_line(cls: type) -> str:
    name = f"{cls.__module__}.{cls.__qualname__}"
    root = cls.__module__.split(".", 1)[0]
    version = getattr(sys.modules.get(root), "__version__", "")
    try:
        file = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return f"{name} {version} {_bytecode(cls)}\n"
    if root in ("torch", "torchvision", "timm") or any(part in _INSTALLED for part in file.parts):
        return f"{name} {version}\n"
    source = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else _bytecode(cls)
    return f"{name} {source}\n"


def _bytecode(cls: type) -> str:
    """Stand in for the source of a class that was defined interactively."""
    code = getattr(getattr(cls, "forward", None), "__code__", None)
    if code is None:
        return ""
    constants = [item for item in code.co_consts if not inspect.iscode(item)]
    return hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()
