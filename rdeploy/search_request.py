"""What a user asked `rdeploy optimize` for, as options, goes in; a checked `SearchRequest` comes out. Loads no model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rdeploy import plugins, targets
from rdeploy.build_request import BuildRequest
from rdeploy.errors import ConfigError
from rdeploy.request import BuildOptions, build_request, command_line
from rdeploy.search import Budget
from rdeploy.types import OBJECTIVES, PRECISIONS

_MOST_WORKERS, _MOST_SAMPLES = 1024, 100_000
PLACES = ("input", "stem", "patch", "tokens")
"""Where a search reduces the resolution unless it is told; the places that a model does not have are ruled out."""


class SearchOptions(BuildOptions, total=False):
    """The options of `rdeploy optimize` with underscores: those of `rdeploy build`, the budget, and how long it may take."""

    max_drop: float | None
    max_latency_ms: float | None
    max_memory_mb: float | None
    max_size_mb: float | None
    objective: str
    time_budget: float | None
    resume: bool
    workers: int | str | None
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to search: the model, images and target as for a build, the budget, and how long it may take."""

    build: BuildRequest
    budget: Budget
    time_budget_s: float | None = None
    resume: bool = False
    samples: int = 0
    """How many points to draw from the part of the space that cannot be enumerated."""
    workers: str | None = None
    """How many workers to start here, or the address of a Ray cluster; None works alone."""


def search_request(model: str, options: SearchOptions, *, command: str = "") -> SearchRequest:
    """Check everything that can be checked without loading the model.

    Without a precision all that the target knows are searched, without --at all the places, without a size a ladder of them.

    Raises:
        ConfigError: an option is unknown or out of range.
        MissingDependency: a backend was named that cannot build on this machine.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    command = command or command_line("optimize", model, given)
    own = {name: given.pop(name) for name in _OWN if name in given}
    if not any(given.get(name) for name in PRECISIONS):
        known = targets.load(str(given.get("target", "cpu"))).precisions
        given |= {name: True for name in known if name != "int8" or given.get("calib")}
    if not given.get("scale") and not given.get("resolution"):
        given["scale"] = (1.0,)  # a size is left open: the search takes a ladder of them
    given.setdefault("adapt", "none")
    if given.get("finetune") and (not given.get("at") or given.get("scale") == (1.0,)):
        raise ConfigError(
            "finetune in a search trains every point of it: name the few with --at and --scale, or search first and then "
            "`rdeploy build --finetune`"
        )
    build = build_request(model, {**given, "at": given.get("at") or PLACES}, command=command)  # type: ignore[typeddict-item]
    return SearchRequest(
        build=build,
        budget=Budget(**{name: _limit(own.get(name), name) for name in _LIMITS}, objective=_objective(own)),
        time_budget_s=_limit(own.get("time_budget"), "time_budget"),
        resume=bool(own.get("resume")),
        workers=_workers(own.get("workers")),
        samples=_samples(own.get("samples", 0)),
    )


_LIMITS = ("max_drop", "max_latency_ms", "max_memory_mb", "max_size_mb")
_OWN = (*_LIMITS, "objective", "time_budget", "resume", "workers", "samples")


def _objective(own: Mapping[str, Any]) -> str:
    name = str(own.get("objective", "latency"))
    if name not in OBJECTIVES:
        hint = plugins.did_you_mean(name, OBJECTIVES)
        raise ConfigError(f"unknown objective {name!r}{hint}; there are: {', '.join(OBJECTIVES)}")
    return name


def _limit(value: Any, name: str) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not (math.isfinite(number) and (number > 0 or (name == "max_drop" and number == 0))):
        raise ConfigError(f"{name.replace('_', '-')} {number:g} is out of range: it must be above 0")
    return number


def _workers(value: Any) -> str | None:
    """Return the number of workers or the address as text."""
    if value is None:
        return None
    text = str(value).strip()
    if text.isdigit() and 0 < int(text) <= _MOST_WORKERS:
        return text
    if text == "auto" or re.fullmatch(r"(ray://)?[\w.\-\[\]:]+:\d+", text):
        return text
    raise ConfigError(
        f"workers {text!r}: give how many to start here (1 to {_MOST_WORKERS}), "
        "or the address of a Ray cluster: ray://HOST:10001, HOST:6379, auto"
    )


def _samples(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_SAMPLES:
        raise ConfigError(f"samples {value!r} is out of range: it must be a whole number from 0 to {_MOST_SAMPLES}")
    return value
