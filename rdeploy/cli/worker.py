"""`rdeploy worker JOB.json`: one job in this process, with its errors and its output where they can be seen."""

from __future__ import annotations

from pathlib import Path

import click

from rdeploy.cli import SETTINGS, console


@click.command("worker", context_settings=SETTINGS)
@click.argument("job", metavar="JOB.json")
@console.debug
def command(job: str) -> int:
    """Run one job of a build again, in this process, and print its result: reports name this to reproduce a failure."""
    from rdeploy import worker

    code = worker.main([job])
    result = Path(job).with_name(worker.RESULT_FILE)
    if code == 0 and result.is_file():
        click.echo(result.read_text(encoding="utf-8"), nl=False)
    return code
