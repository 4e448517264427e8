"""`rdeploy check CURRENT --baseline BASELINE`: the CI gate. Text, Markdown, annotations, JUnit XML and JSON from one result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console
from rdeploy.cli.duration import Duration
from rdeploy.errors import ConfigError

if TYPE_CHECKING:
    from rdeploy.report.check import Row
    from rdeploy.verdicts import CheckResult


@click.command("check", context_settings=SETTINGS)
@click.argument("current", metavar="CURRENT")
@click.option(
    "--baseline", metavar="BASELINE", help="What to compare with: a bundle, a manifest or a baseline JSON file."
)
@click.option("--write-baseline", metavar="FILE", help="Write CURRENT's baseline JSON file instead of comparing.")
@click.option("--budgets", metavar="FILE", help="A YAML of budgets per metric; see docs/ci-gate.md.")
@click.option("--rerun-baseline", is_flag=True, help="Measure both bundles' engines here, side by side.")
@click.option("--measure", is_flag=True, help="Measure CURRENT's engines here, against what BASELINE holds.")
@click.option(
    "--native", metavar="BUNDLE", help="The native model's bundle, measured beside the others for the ratios."
)
@click.option("--data", metavar="PATH", help="Labelled images: compare the accuracy image by image.")
@click.option("--backend", multiple=True, metavar="NAME", help="Only this engine; repeatable.")
@click.option(
    "--launches", type=click.IntRange(min=0), default=6, show_default=True, help="Fresh processes of each side; from 2."
)
@click.option("--until-decided", is_flag=True, help="Measure more launches until every verdict is settled.")
@click.option("--time-budget", type=Duration(), default="2m", show_default=True, help="At most so long, e.g. 90s, 2m.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime; 1 is calmest on a shared machine.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--markdown", metavar="FILE", help="Write the comment for a pull request.")
@click.option("--junit", metavar="FILE", help="Write JUnit XML.")
@click.option("--history", metavar="FILE", help="Add CURRENT to this history; see `rdeploy history`.")
@console.as_json
@console.debug
@click.pass_obj
def command(state: State, /, current: str, as_json: bool, **options: Any) -> int:
    """Compare CURRENT with a baseline: pass, regression, improvement or inconclusive, metric by metric.

    CURRENT is a bundle, a manifest or a baseline JSON file. Exit codes: 0 pass or improvement, 1 regression,
    4 inconclusive.
    """
    _refuse_nonsense(options)
    if options["write_baseline"]:
        return _write(state, current, as_json, options)
    from rdeploy import gate

    kept = ("rerun_baseline", "measure", "native", "data", "backend", "launches", "until_decided", "threads", "seed")
    with console.progress("comparing", verbose=state.debug) as show:
        result = gate.check(
            current,
            options["baseline"],
            budget_file=options["budgets"],
            time_budget_s=options["time_budget"],
            progress=show,
            **{name: options[name] for name in kept},
        )
    if options["history"]:
        from rdeploy import baseline, history

        history.add(options["history"], baseline.read(current), verdict=result.verdict)
    if as_json:
        console.print_json({**_document(result), "exit_code": result.exit_code})
    else:
        _print(result)
    _leave(result, options, to_stderr=as_json)
    if result.exit_code:
        from rdeploy.report import check as report

        console.warn(f"rdeploy check: {report.headline(result)}")
    return result.exit_code


def _refuse_nonsense(options: dict[str, Any]) -> None:
    measures = options["rerun_baseline"] or options["measure"]
    problems = (
        (not options["baseline"] and not options["write_baseline"], "give --baseline FILE, or --write-baseline FILE"),
        (options["baseline"] and options["write_baseline"], "--baseline compares, --write-baseline writes: give one"),
        (
            options["rerun_baseline"] and options["measure"],
            "--rerun-baseline measures CURRENT too: leave out --measure",
        ),
        (
            options["native"] and options["rerun_baseline"],
            "--rerun-baseline compares the two directly: leave out --native",
        ),
        (options["native"] and not measures and options["baseline"], "--native measures: it needs --measure"),
        (options["until_decided"] and not measures, "--until-decided measures: it needs --rerun-baseline or --measure"),
        (options["launches"] < 2 and measures, "--launches must be 2 or more: one says nothing about how they scatter"),
    )
    for wrong, message in problems:
        if wrong:
            raise ConfigError(message)


def _write(state: State, current: str, as_json: bool, options: dict[str, Any]) -> int:
    from rdeploy import gate

    kept = ("native", "data", "backend", "launches", "threads", "seed")
    path = options["write_baseline"]
    with console.progress("measuring", verbose=state.debug) as show:
        found = gate.write_baseline(current, path, progress=show, **{name: options[name] for name in kept})
    if as_json:
        console.print_json(found)
    else:
        launches = {one.backend: len(one.launches) for one in found.engines}
        told = ", ".join(f"{backend} {count}" for backend, count in launches.items())
        click.echo(f"{path}: {found.name}, launches: {told or 'none'}")
    return 0


def _document(result: CheckResult) -> dict[str, Any]:
    from rdeploy import serde

    return dict(serde.to_json(result))


def _print(result: CheckResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    from rdeploy.report import check as report

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("verdict", "metric", "engine"):
        table.add_column(name)
    for name in ("baseline", "current", "change", "budget"):
        table.add_column(name, justify="right")
    found = report.rows(result)
    for row in found:
        table.add_row(*(escape(cell) for cell in _cells(row)))
    console.print_table(table)
    for line in report.reasons(found):
        click.echo(line)
    for line in report.advice(result):
        click.echo(line)
    click.echo(report.headline(result))


def _cells(row: Row) -> tuple[str, ...]:
    return row.verdict, row.metric, row.backend, row.baseline, row.current, row.change, row.budget


def _leave(result: CheckResult, options: dict[str, Any], *, to_stderr: bool) -> None:
    """Write the files that were asked for, and on GitHub the step's summary and the annotations."""
    from rdeploy.report import check as report

    if options["markdown"]:
        _save(options["markdown"], report.markdown(result))
    if options["junit"]:
        _save(options["junit"], report.junit(result))
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    for line in report.github_annotations(result):
        click.echo(line, err=to_stderr)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _save(summary, report.markdown(result), append=True)


def _save(path: str, text: str, *, append: bool = False) -> None:
    try:
        with Path(path).open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
