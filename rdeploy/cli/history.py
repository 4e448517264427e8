"""`rdeploy history add|list|trend`: what was measured over time, and where it changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rdeploy.cli import SETTINGS, console

if TYPE_CHECKING:
    from rdeploy.history import Trend

_file = click.option(
    "--file", "path", default="rdeploy-history.sqlite", show_default=True, metavar="FILE", help="The SQLite file."
)
_name = click.option("--name", metavar="NAME", help="Only this variant, as `rdeploy history list` names it.")
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 60


@click.group("history", context_settings=SETTINGS)
def command() -> None:
    """Keep what was measured over time in one SQLite file; several jobs may write at once."""


@command.command("add", context_settings=SETTINGS)
@click.argument("result", metavar="RESULT")
@click.option("--label", default="", help="What it belongs to, such as a commit.")
@_file
@console.debug
def add(result: str, label: str, path: str) -> None:
    """Add RESULT: a bundle, a manifest or a baseline JSON file."""
    from rdeploy import baseline, history

    snapshot = baseline.read(result)
    number = history.add(path, snapshot, label=label)
    click.echo(f"{path}: entry {number}, {snapshot.name}")


@command.command("list", context_settings=SETTINGS)
@_name
@_file
@console.as_json
@console.debug
def list_runs(name: str | None, path: str, as_json: bool) -> None:
    """List the entries, oldest first."""
    from rich.markup import escape
    from rich.table import Table

    from rdeploy import history

    found = history.runs(path, name=name)
    if as_json:
        console.print_json(found)
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("entry", "when", "variant", "label", "verdict", "machine"):
        table.add_column(column, overflow="fold")
    for run in found:
        table.add_row(*(escape(str(x)) for x in (run.id, run.at, run.name, run.label, run.verdict, run.machine)))
    console.print_table(table)


@command.command("trend", context_settings=SETTINGS)
@click.argument("metric", metavar="METRIC")
@click.option("--backend", metavar="NAME", help="Only this engine.")
@_name
@_file
@console.as_json
@console.debug
def trend(metric: str, backend: str | None, name: str | None, path: str, as_json: bool) -> None:
    """Show how METRIC (latency, speedup, macs, ...) went, and where its level changed."""
    from rdeploy import history

    found = history.trends(path, metric, name=name, backend=backend)
    if as_json:
        console.print_json(found)
        return
    for one in found:
        for line in _lines(one):
            click.echo(line)


def _lines(one: Trend) -> list[str]:
    where = " ".join(part for part in (one.name, one.backend, one.machine and f"on machine {one.machine}") if part)
    count = "1 entry" if len(one.values) == 1 else f"{len(one.values)} entries"
    lines = [f"{where}: {one.metric} {one.values[-1]:.6g}, {count}", f"  {_spark(one.values)}"]
    for index in one.changes:
        before = next(mean for _, end, mean in one.levels if end == index)
        after = next(mean for begin, _, mean in one.levels if begin == index)
        run = one.runs[index]
        change = f"{100 * (after / before - 1):+.1f} %" if before else f"{after:+.4g}"
        label = f" {run.label}" if run.label else ""
        lines.append(f"  changed at entry {run.id}{label} ({run.at}): {before:.6g} -> {after:.6g}, {change}")
    return lines


def _spark(values: tuple[float, ...]) -> str:
    """Return the last values as a row of bars, lowest to highest."""
    shown = values[-_SHOWN:]
    low, high = min(shown), max(shown)
    span = high - low
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in shown)
