"""How an engine is opened: a small file beside it says what its bytes do not; it goes in, a runtime that fits comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import serde

_SUFFIX = ".opening"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a runtime has to be told before it opens an engine.

    dla_core: the DLA core that it runs on; a runtime takes core 0 unless it is told.
    """

    dla_core: int | None = None


def keep(path: Path, opening: Opening) -> None:
    """Write `ENGINE.opening` beside an engine that needs one."""
    if opening != Opening():
        path.with_name(path.name + _SUFFIX).write_text(serde.dumps(opening))


def of(path: Path) -> Opening:
    """Return how an engine is opened; one that has no such file needs nothing.

    Raises:
        ConfigError: the file is not one of this version's.
    """
    sidecar = path.with_name(path.name + _SUFFIX)
    if not sidecar.is_file():
        return Opening()
    return serde.from_json(Opening, serde.loads(sidecar.read_text()), where=str(sidecar))


def runtime(trt: Any, logger: Any, opening: Opening) -> Any:
    """Return a runtime that is set up for such an engine."""
    made = trt.Runtime(logger)
    if opening.dla_core is not None:
        made.DLA_core = opening.dla_core
    return made
