"""`rdeploy optimize MODEL`: a budget goes in; the front, the pick with its reason, and their bundles come out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, build, console, duration
from rdeploy.cli.duration import Duration
from rdeploy.types import EXPECTED, OBJECTIVES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from rdeploy.optimization import OptimizeResult
    from rdeploy.search import Evidence
    from rdeploy.standing import Standing

_SEARCH = (
    click.option("--max-drop", type=float, metavar="POINTS", help="At most so many points of the metric may be lost."),
    click.option("--max-latency-ms", type=float, metavar="MS", help="At most this median latency."),
    click.option("--max-memory-mb", type=float, metavar="MB", help="At most this peak memory of a process."),
    click.option("--max-size-mb", type=float, metavar="MB", help="At most this engine size."),
    click.option("--objective", type=click.Choice(OBJECTIVES), default="latency", show_default=True),
    click.option(
        "--time-budget",
        type=Duration(),
        metavar="TIME",
        help="Stop searching after 90s, 20m, 2h; what was measured counts.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the run in --out."),
    click.option(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="Then measure N points of what cannot be enumerated: layers in float, token schedules (extra `scale`).",
    ),
    click.option(
        "--workers",
        metavar="N|ray://HOST:PORT",
        help="Judge and build in N processes here, or on the nodes of a Ray cluster (extra `scale`).",
    ),
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SEARCH):
        function = option(function)
    return build.with_options(function)


@click.command("optimize", context_settings=SETTINGS)
@click.argument("model", metavar="MODEL")
@_with_options
@click.pass_obj
def command(state: State, /, model: str, as_json: bool, **options: Any) -> int:
    """Search resolutions, places, precisions and runtimes for the best deployable point of MODEL under a budget.

    Without a precision, a size or a place all are searched. What was measured is kept in --out/run.sqlite.
    """
    from rdeploy import api

    options["arch_kwargs"] = dict(options["arch_kwargs"])
    with console.live("searching", verbose=state.debug) as (show, draw):
        watch = None if draw is None else lambda standing: draw(_live(standing))
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it has to say about its nodes
            found = api.optimize(model, command=state.command, progress=show, watch=watch, **options)
    if as_json:
        console.print_json(_document(found))
    else:
        _print(found)
    return 0 if found.choice.pick else 1


def _document(found: OptimizeResult) -> dict[str, Any]:
    return {
        "pick": found.choice.pick,
        "second": found.choice.second,
        "reason": found.choice.reason,
        "front": found.front,
        "measured": found.measured,
        "ruled_out": dict(found.ruled_out),
        "failures": dict(found.failures),
        "unfinished": found.unfinished,
        "bundles": {row.variant.id: row.bundle for row in found.result.variants},
    }


def _live(now: Standing) -> RenderableType:
    """Return the front so far with the best of it, below what is known of the rest."""
    from rich.console import Group

    from rdeploy import search

    left = f"at most {now.left} left" + (f", {duration.text(now.seconds_left)}" if now.seconds_left is not None else "")
    best = f"best so far: {now.best.point.id}" if now.best else "none within the budget so far"
    marks = {now.best.point.id: "best so far"} if now.best else {}
    shown = [one for one in now.measured if one == now.best or one in search.front(now.measured)]
    return Group(f"{len(now.measured)} points measured, {left} · {best}", _table(shown, marks=marks))


def _table(measured: Sequence[Evidence], *, marks: dict[str, str]) -> Table:
    from rich.table import Table

    from rdeploy import search

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    batched = any(one.point.batch > 1 for one in measured)
    rate = ("images/s",) if batched else ()
    for name in ("point", "p50 ms", *rate, "loses, points [95 %]", "peak MB", "size MB", "GMACs", ""):
        table.add_column(name, justify="left" if name in ("point", "") else "right")
    on_front = {one.point.id for one in search.front(measured)}
    for one in sorted(measured, key=lambda e: e.ms_per_image):
        peak = "–" if one.memory_bytes is None else f"{one.memory_bytes / 1e6:.0f}"
        mark = marks.get(one.point.id) or ("front" if one.point.id in on_front else "")
        drop = f"{one.drop.value:.1f} [{one.drop.low:.1f}, {one.drop.high:.1f}]"
        size, macs = f"{one.size_bytes / 1e6:.1f}", f"{one.macs / 1e9:.2f}"
        speed = (
            f"{one.latency_ms.value:.2f}{'*' * bool(one.unfit)}",
            *([f"{one.throughput_ips:.0f}"] if batched else []),
        )
        table.add_row(one.point.id, *speed, drop, peak, size, macs, mark)
    return table


def _print(found: OptimizeResult) -> None:
    from rdeploy.runs import OUTCOME

    marks = {
        e.point.id: name for e, name in ((found.choice.second, "second"), (found.choice.pick, "pick")) if e is not None
    }
    console.print_table(_table(found.measured, marks=marks))
    for doubt in dict.fromkeys(reason for one in found.measured for reason in one.unfit):
        console.warn(f"* the machine was not fit to measure on: {doubt}")
    for note in found.result.notes:
        if not note.startswith(EXPECTED):  # told before the search began
            console.warn(note)
    for name, reason in found.ruled_out:
        if "@" not in name:
            console.warn(f"{name} was ruled out: {reason}")
    if points := [name for name, _ in found.ruled_out if "@" in name]:
        console.warn(f"{len(points)} points were not measured: they cannot be the answer; why, each: {OUTCOME}")
    for name, reason in found.failures:
        console.warn(f"{name} was not measured: {reason}")
    if found.unfinished:
        console.warn(f"the time was up with {len(found.unfinished)} hopeful points not measured; go on with --resume")
    click.echo(f"pick: {found.choice.pick.point.id if found.choice.pick else 'none'}: {found.choice.reason}")
    for row in found.result.variants:
        if row.bundle:
            click.echo(f"{row.variant.id}: {row.bundle}")
