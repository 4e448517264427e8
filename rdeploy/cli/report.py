"""`rdeploy report RUN`: one self-contained HTML page of a run, or its Markdown, CSV and plots."""

from __future__ import annotations

from pathlib import Path

import click

from rdeploy.cli import SETTINGS, State, console
from rdeploy.types import REPORTS


@click.command("report", context_settings=SETTINGS)
@click.argument("path", metavar="RUN")
@click.option(
    "--out",
    metavar="PATH",
    help="The file to write, for plots the folder. [default: report.* inside of RUN, NAME-report.* beside a bundle]",
)
@click.option("--format", "kind", type=click.Choice(REPORTS), default="html", show_default=True)
@console.debug
@click.pass_obj
def command(state: State, /, path: str, out: str | None, kind: str) -> int:
    """Write the report of a run: RUN is a folder of bundles, or one bundle."""
    from rdeploy import api

    with console.progress("drawing", verbose=state.debug):
        written = api.report(path, out=out, kind=kind)
    for file in written:
        click.echo(str(Path(file)))
    return 0
