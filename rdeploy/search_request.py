"""What a user asked `rdeploy optimize` for, as options, goes in; a checked `SearchRequest` comes out. Loads no model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rdeploy import plugins, resize, targets
from rdeploy.build_request import BuildRequest
from rdeploy.errors import ConfigError
from rdeploy.option_values import number
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
    ladder: bool = False
    """Whether no size was asked for, and a ladder of them is searched."""
    left_out: tuple[tuple[str, str], ...] = ()
    """The precisions that are not searched although nobody said so, with the reason."""


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
    left_out = _with_precisions(given)
    given["at"] = given.get("at") or PLACES
    ladder = not given.get("scale") and not given.get("resolution") and _is_open(given["at"])
    if ladder:
        given["scale"] = (1.0,)  # says that the sizes come from elsewhere
    given.setdefault("adapt", "none")
    if given.get("finetune") and (given["at"] is PLACES or ladder):
        raise ConfigError(
            "finetune in a search trains every point of it: name the few with --at and --scale, or search first and then "
            "`rdeploy build --finetune`"
        )
    build = build_request(model, given, command=command)  # type: ignore[arg-type]
    samples = _samples(own.get("samples", 0))
    if samples and "int8" not in build.precisions and not any("tokens" in at for at in build.at):
        raise ConfigError(
            "samples: there is nothing to sample, every point can be enumerated: layers are kept in float with --int8, and "
            "schedules vary with --at tokens"
        )
    return SearchRequest(
        build=build,
        budget=Budget(**{name: _limit(own.get(name), name) for name in _LIMITS}, objective=_objective(own)),
        time_budget_s=_limit(own.get("time_budget"), "time_budget"),
        resume=bool(own.get("resume")),
        workers=_workers(own.get("workers")),
        samples=samples,
        ladder=ladder,
        left_out=left_out,
    )


def _with_precisions(given: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Add all precisions that the target knows where none was named; return those that cannot be had, with the reason."""
    if any(given.get(name) for name in PRECISIONS):
        return ()
    known = targets.load(str(given.get("target", "cpu"))).precisions
    without = "int8" in known and not given.get("calib")
    given |= {name: True for name in known if not (name == "int8" and without)}
    return (("int8", "it needs images to find its ranges: give some of your own with --calib FOLDER"),) * without


def _is_open(at: Any) -> bool:
    """Whether some place does not say its own scale."""
    texts = at if isinstance(at, (list, tuple)) else (at,)
    return any(scale is None for text in texts for _, scale in resize.parse(str(text)))


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
    if name == "time_budget" and isinstance(value, str):
        raise ConfigError(f"time-budget {value!r} is not a number of seconds, such as 1200")
    limit, least = number(value, name.replace("_", "-")), "0 or more" if name == "max_drop" else "above 0"
    if not math.isfinite(limit) or limit < 0 or (limit == 0 and name != "max_drop"):
        raise ConfigError(f"{name.replace('_', '-')} {limit:g} is out of range: it must be {least}")
    return limit


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
