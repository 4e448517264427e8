"""`rdeploy package BUNDLE --triton DIR`: a bundle as a model of a server's repository."""

from __future__ import annotations

from pathlib import Path

import click

from rdeploy.cli import SETTINGS, console


@click.command("package", context_settings=SETTINGS)
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--triton", "repository", required=True, metavar="DIR", help="The Triton model repository to write it into."
)
@click.option(
    "--backend", metavar="NAME", help="This engine of the bundle; the default is the best that Triton serves."
)
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Engines side by side.")
@click.option(
    "--max-queue-delay-us",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="How long a request may wait for others to fill a batch.",
)
@console.as_json
@console.debug
def command(
    bundle: str, repository: str, backend: str | None, instances: int, max_queue_delay_us: int, as_json: bool
) -> None:
    """Write a bundle into a Triton model repository: the engine, config.pbtxt with batching and warm-up, the labels."""
    from rdeploy import triton

    serving = triton.Serving(instances=instances, max_queue_delay_us=max_queue_delay_us)
    place = triton.package(bundle, Path(repository), backend=backend, serving=serving)
    if as_json:
        console.print_json({"model": str(place), "config": str(place / triton.CONFIG)})
    else:
        click.echo(str(place))
