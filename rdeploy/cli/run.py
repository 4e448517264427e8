"""`rdeploy run BUNDLE IMAGE...`: images go in, the most probable classes of each come out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console
from rdeploy.errors import ConfigError

if TYPE_CHECKING:
    from rdeploy.runtime import Model


@click.command("run", context_settings=SETTINGS)
@click.argument("bundle", metavar="BUNDLE")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--top", "count", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes.")
@click.option(
    "--backend", metavar="NAME", help="Run this engine of the bundle; the default is the best that runs here."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@console.as_json
@console.debug
@click.pass_obj
def command(
    state: State,
    bundle: str,
    images: tuple[str, ...],
    count: int,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Print the most probable classes of each image. An image that cannot be read is one line on stderr."""
    from rdeploy import runtime

    with warnings.catch_warnings(record=True) as caught, console.progress("running", verbose=state.debug) as show:
        warnings.simplefilter("always", UserWarning)
        with runtime.load(bundle, backend=backend, threads=threads) as model:
            rows = [_predict(model, image, count, show) for image in images]
            name = model.backend
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            console.warn(f"rdeploy run: {warning.message}")
    for row in rows:
        if row["error"]:
            console.warn(f"rdeploy run: {row['error']}")
    if as_json:
        console.print_json({"bundle": bundle, "backend": name, "images": rows})
    else:
        _print(rows)
    return 2 if any(row["error"] for row in rows) else 0


def _predict(model: Model, image: str, count: int, show: Any) -> dict[str, Any]:
    show(image)
    try:
        best = model.top(image, count)
    except ConfigError as error:
        return {"image": image, "error": str(error), "predictions": []}
    found = [{"index": index, "label": label, "probability": probability} for index, label, probability in best]
    return {"image": image, "error": None, "predictions": found}


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["error"]:
            continue
        click.echo(row["image"])
        for one in row["predictions"]:
            click.echo(f"  {100 * one['probability']:5.1f} %  {one['label']}")
