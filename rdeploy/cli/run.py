"""`rdeploy run BUNDLE IMAGE...`: images go in, what the task answers comes out: classes, an overlay, a vector."""

from __future__ import annotations

import warnings
from pathlib import Path
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
@click.option("--out", default=".", show_default=True, metavar="DIR", help="Where the overlays go.")
@click.option(
    "--backend", metavar="NAME", help="Run this engine of the bundle; the default is the best that runs here."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@console.as_json
@console.debug
@click.pass_obj
def command(
    state: State,
    /,
    bundle: str,
    images: tuple[str, ...],
    backend: str | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Print what the network says of each image. An image that cannot be read is one line on stderr.

    A classifier: the most probable classes. A segmentation: the classes and their share of the pixels, and a picture
    IMAGE-overlay.png. A detector: the boxes (left, top, right, bottom), and that picture. An embedding: the vector
    (whole with --json).
    """
    from rdeploy import runtime

    with warnings.catch_warnings(record=True) as caught, console.progress("running", verbose=state.debug) as show:
        warnings.simplefilter("always", UserWarning)
        with runtime.load(bundle, backend=backend, threads=threads) as model:
            rows = [_answer(model, image, options, show) for image in images]
            name, task = model.backend, model.task
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            console.warn(f"rdeploy run: {warning.message}")
    for row in rows:
        if row["error"]:
            console.warn(f"rdeploy run: {row['error']}")
    if as_json:
        console.print_json({"bundle": bundle, "backend": name, "task": task, "images": rows})
    else:
        _print(rows)
    return 2 if any(row["error"] for row in rows) else 0


def _answer(model: Model, image: str, options: dict[str, Any], show: Any) -> dict[str, Any]:
    show(image)
    ask = {"segmentation": _segmented, "embedding": _embedded, "detection": _detected}.get(model.task, _classified)
    try:
        return {"image": image, "error": None, **ask(model, image, options)}
    except ConfigError as error:
        return {"image": image, "error": str(error), "predictions": []}


def _classified(model: Model, image: str, options: dict[str, Any]) -> dict[str, Any]:
    best = model.top(image, options["count"])
    found = [{"index": index, "label": label, "probability": probability} for index, label, probability in best]
    return {"predictions": found}


def _segmented(model: Model, image: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the classes by their share of the pixels, and write the overlay."""
    import numpy as np

    from rdeploy import runtime
    from rdeploy.data import overlay

    picture = runtime.read_image(image)
    classes = model.segment(picture)
    values, counts = np.unique(classes[classes >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    found = [
        {"index": int(values[i]), "label": model.label(int(values[i])), "share": float(counts[i] / classes.size)}
        for i in order
    ]
    folder = Path(options["out"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(image).stem}-overlay.png"
    overlay.paint_classes(picture, classes).save(path)
    return {"predictions": found, "overlay": str(path)}


def _detected(model: Model, image: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the boxes, the most certain first, and write them over the image."""
    from rdeploy import runtime
    from rdeploy.data import overlay

    picture = runtime.read_image(image)
    found = model.detect(picture)
    classes = [int(row[5]) for row in found]
    texts = [f"{model.label(index)} {100 * row[4]:.0f} %" for index, row in zip(classes, found)]
    folder = Path(options["out"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(image).stem}-overlay.png"
    overlay.draw_boxes(picture, [row[:4] for row in found], classes, texts).save(path)
    shown = [
        {"index": i, "label": model.label(i), "probability": float(row[4]), "box": [float(side) for side in row[:4]]}
        for i, row in zip(classes, found)
    ]
    return {"predictions": shown, "overlay": str(path)}


def _embedded(model: Model, image: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"predictions": [], "embedding": [float(number) for number in model.first(model(image))[0].ravel()]}


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["error"]:
            continue
        click.echo(row["image"])
        for one in row["predictions"]:
            where = f"  {', '.join(f'{side:.0f}' for side in one['box'])}" if "box" in one else ""
            click.echo(f"  {100 * one.get('probability', one.get('share')):5.1f} %  {one['label']}{where}")
        if "overlay" in row:
            click.echo(f"  {row['overlay']}")
        if vector := row.get("embedding"):
            click.echo(f"  {len(vector)} numbers: {', '.join(f'{number:.4f}' for number in vector[:8])}, ...")
