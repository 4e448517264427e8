"""`rdeploy targets [NAME]`: the profiles there are, or what one of them says."""

from __future__ import annotations

import click

from rdeploy.cli import SETTINGS, console


@click.command("targets", context_settings=SETTINGS)
@click.argument("name", required=False, metavar="[NAME|FILE]")
@console.as_json
@console.debug
def command(name: str | None, as_json: bool) -> None:
    """List the target profiles, or show everything that one says."""
    from rdeploy import serde, targets

    if name is not None:
        found = targets.load(name)
        if as_json:
            console.print_json(found)
        else:
            _show(serde.to_json(found))
        return
    profiles = [targets.load(known) for known in targets.names()]
    if as_json:
        console.print_json(profiles)
        return
    click.echo(f"this machine: {targets.auto()}")
    width = max(len(profile.name) for profile in profiles)
    for profile in profiles:
        click.echo(f"{profile.name:<{width}}  {profile.description or ', '.join(profile.backends)}")


def _show(facts: dict[str, object]) -> None:
    import yaml

    click.echo(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True), nl=False)
