"""`rdeploy doctor`: what works on this machine, and the exact fix for what does not."""

from __future__ import annotations

import click

from rdeploy.cli import SETTINGS, State, console

_WORDS = {"pass": "PASS", "fail": "FAIL", "info": ""}


@click.command("doctor", context_settings=SETTINGS)
@console.as_json
@console.debug
@click.pass_obj
def command(state: State, as_json: bool) -> int:
    """Build and run a tiny network on every backend. The exit code is 3 when none of them works."""
    from rdeploy import doctor

    with console.progress("examining", verbose=state.debug):
        found = doctor.diagnose()
    if as_json:
        console.print_json(found)
    else:
        width = max(len(one.name) for one in found)
        for one in found:
            click.echo(f"{_WORDS[one.status]:<4}  {one.name:<{width}}  {one.detail}".rstrip())
            if one.fix:
                click.echo(f"{'':<4}  {'':<{width}}  fix: {one.fix}")
    return 0 if any(one.kind == "backend" and one.status == "pass" for one in found) else 3
