"""Resolution as a compression axis: one module per place where the resolution is reduced.

A method defines `Options`, `unsupported(module, spec, resolution) -> str | None` (the reason in plain words),
`snap(module, spec, resolution) -> Size` (the nearest resolution that the model can take) and
`apply(module, spec, resolution, options) -> Module` (a new module; the one that came in is left untouched).
"""

from __future__ import annotations

from typing import Any, Protocol

from rdeploy import plugins
from rdeploy.types import ModelSpec, Size


class ResizeMethod(Protocol):
    """What a module in this folder defines."""

    Options: type

    def unsupported(self, module: Any, spec: ModelSpec, resolution: Size) -> str | None: ...

    def snap(self, module: Any, spec: ModelSpec, resolution: Size) -> Size: ...

    def apply(self, module: Any, spec: ModelSpec, resolution: Size, options: Any) -> Any: ...


def find(name: str) -> Any:
    """Import a resize method by name; the result satisfies `ResizeMethod`."""
    return plugins.find("rdeploy.resize", name)
