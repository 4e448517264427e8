"""rdeploy: lower resolution, INT8 and real engines for trained vision models, measured on the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "check", "evaluate", "load", "optimize", "profile"]

if TYPE_CHECKING:
    from rdeploy.api import build, evaluate, optimize, profile
    from rdeploy.gate import check
    from rdeploy.runtime import load

_PLACES = {
    "build": "rdeploy.api",
    "check": "rdeploy.gate",
    "evaluate": "rdeploy.api",
    "optimize": "rdeploy.api",
    "profile": "rdeploy.api",
    "load": "rdeploy.runtime",
}


def __getattr__(name: str) -> Any:
    """Load the Python interface on first use: `import rdeploy` itself stays free of NumPy, torch and the runtimes."""
    if name not in _PLACES:
        raise AttributeError(f"module 'rdeploy' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
