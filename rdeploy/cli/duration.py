"""A duration as people write it goes in (`90`, `90s`, `2m`, `1.5h`), seconds come out; and the other way."""

from __future__ import annotations

import re

import click

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType):
    """An option's value in seconds."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds; fails for anything that is no positive duration."""
        if isinstance(value, (int, float)):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
        seconds = float(found.group(1)) * _SECONDS[found.group(2)] if found else 0.0
        if seconds <= 0:
            self.fail(f"{value!r} is not a duration; write it as 90s, 2m or 1h", param, ctx)
        return seconds


def text(seconds: float) -> str:
    """Return a duration as people say it: `40 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
