"""`rdeploy schema NAME`: the JSON Schema of a file that rdeploy writes."""

from __future__ import annotations

from importlib import resources

import click

from rdeploy import plugins
from rdeploy.cli import SETTINGS, console
from rdeploy.errors import ConfigError

_SUFFIX = ".schema.json"


@click.command("schema", context_settings=SETTINGS)
@click.argument("name", metavar="NAME")
@console.debug
def command(name: str) -> None:
    """Print the JSON Schema NAME, such as manifest."""
    folder = resources.files("rdeploy") / "schemas"
    known = sorted(file.name.removesuffix(_SUFFIX) for file in folder.iterdir() if file.name.endswith(_SUFFIX))
    if name not in known:
        raise ConfigError(f"unknown schema {name!r}{plugins.did_you_mean(name, known)}; there are: {', '.join(known)}")
    click.echo((folder / f"{name}{_SUFFIX}").read_text(encoding="utf-8"), nl=False)
