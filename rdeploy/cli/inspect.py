"""`rdeploy inspect MODEL|BUNDLE|MODEL.onnx`: what a network is made of and what it costs, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console, model_options
from rdeploy.types import format_size

if TYPE_CHECKING:
    from rdeploy.graph.cost import Layer
    from rdeploy.results import Cost

_LAYERS, _IMAGES = 20, 16


def _with_model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(model_options.OPTIONS):
        function = option(function)
    return function


@click.command("inspect", context_settings=SETTINGS)
@click.argument("path", metavar="MODEL|BUNDLE")
@click.option(
    "--quant", is_flag=True, help="Each quantized tensor of a bundle: range, clipping, SQNR, what would repair it."
)
@click.option("--calib", type=click.Path(exists=True), help="With --quant: real images to run (16 of them).")
@click.option("--all", "every", is_flag=True, help=f"Every layer; without it the {_LAYERS} with the most MACs.")
@_with_model_options
@console.as_json
@console.debug
@click.pass_obj
def command(
    state: State, /, path: str, quant: bool, calib: str | None, every: bool, as_json: bool, **options: Any
) -> None:
    """Show layers, MACs, parameters, activation bytes, and which layers are quantized."""
    if quant:
        _explain(path, calib, as_json=as_json)
        return
    from rdeploy import bundle
    from rdeploy.graph import cost

    manifest = bundle.read(path) if bundle.is_bundle(path) else None
    with console.progress("reading", verbose=state.debug):
        if manifest is not None:
            onnx = bundle.folder_of(path) / "model.onnx"
            total, layers = cost.summarize(onnx), cost.layers(onnx)
        else:
            total, layers = _of_model(path, options)
    if as_json:
        console.print_json({"cost": total, **_coverage(layers), "layers": layers, "manifest": manifest})
        return
    if manifest is not None:
        _print_manifest(manifest)
    _print(total, layers, every=every)


def _explain(path: str, calib: str | None, *, as_json: bool) -> None:
    from rdeploy import bundle
    from rdeploy.quantize import explain

    manifest = bundle.read(path)
    images = _images(manifest, calib) if calib else []
    found = explain.explain(bundle.folder_of(path) / "model.onnx", images)
    place = explain.first_place(found)
    if as_json:
        console.print_json({"tensors": found, "first_place": place, "samples": len(images)})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("tensor", "range", "clipped %", "own dB", "SQNR dB", "what would repair it"):
        table.add_column(name, overflow="fold")
    for tensor in found:
        numbers = (None if tensor.clipped is None else 100 * tensor.clipped, tensor.own_db, tensor.sqnr_db)
        texts = ("" if number is None else f"{number:.2f}" for number in numbers)
        table.add_row(tensor.name, f"{tensor.low:.3g} .. {tensor.high:.3g}", *texts, tensor.advice)
    console.print_table(table)
    click.echo(place)
    click.echo("rounded weights are not in these figures: a bundle does not hold the exact ones")


def _images(manifest: dict[str, Any], calib: str) -> list[Any]:
    """Return 16 images as the bundle's graph takes them: normalised, or pictures where it normalises them itself."""
    from rdeploy import bundle
    from rdeploy.data import images, preprocess

    facts, preprocessing = manifest["model"], bundle.preprocessing(manifest)
    chosen, size = images.collect(calib, limit=_IMAGES), bundle.input_size(manifest)
    pixels = preprocess.prepare(chosen, size, preprocessing, channels=facts["channels"])
    embedded = facts["preprocessing"].get("embedded", False)
    return [row[None] if embedded else preprocess.normalise(row[None], preprocessing) for row in pixels]


def _of_model(path: str, options: dict[str, Any]) -> tuple[Cost, tuple[Layer, ...]]:
    import tempfile

    from rdeploy import export, models
    from rdeploy.graph import cost
    from rdeploy.request import load_options

    loaded = models.load(path, load_options(options))
    if loaded.onnx is not None:
        return cost.summarize(loaded.onnx), cost.layers(loaded.onnx)
    with tempfile.TemporaryDirectory(prefix="rdeploy-inspect-") as folder:
        onnx = Path(folder) / "model.onnx"
        export.export(loaded.module, loaded.spec, loaded.spec.native_resolution, onnx)
        return cost.summarize(onnx), cost.layers(onnx)


def _coverage(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return how the layers and the MACs divide over the precisions."""
    macs = sum(layer.macs for layer in layers)
    quantized = sum(layer.macs for layer in layers if layer.precision == "int8")
    counts = dict(Counter(layer.precision for layer in layers))
    return {"layers_by_precision": counts, "int8_share_of_macs": quantized / macs if macs else 0.0}


def _print_manifest(manifest: dict[str, Any]) -> None:
    model, variant = manifest["model"], manifest["variant"]
    sizes = (format_size((size[0], size[1])) for size in (variant["resolution"], model["native_resolution"]))
    click.echo(f"{model['name']} {variant['precision']} at {' (native '.join(sizes)}), for {manifest['target']}")
    for engine in manifest["engines"]:
        executed = ", ".join(f"{count} {name}" for name, count in engine["executed_precision"].items())
        where = f"for {', '.join(engine['built_for'])}" if engine["built_for"] else f"on {engine['device']}"
        size = f"{engine['size_bytes'] / 1e6:.1f} MB"
        click.echo(
            f"  {engine['backend']} {engine['backend_version']} {where}, {size}"
            + f"; executed: {executed}" * bool(executed)
        )


def _print(total: Cost, layers: Sequence[Layer], *, every: bool) -> None:
    from rich.table import Table

    found = _coverage(layers)
    counts = ", ".join(f"{count} {name}" for name, count in found["layers_by_precision"].items())
    click.echo(
        f"{total.macs / 1e9:.3f} GMACs, {total.params / 1e6:.2f} M parameters ({total.weight_bytes / 1e6:.1f} MB)"
    )
    click.echo(f"peak live activations {total.activation_bytes / 1e6:.1f} MB at batch 1")
    click.echo(f"{len(layers)} layers: {counts}; Q/DQ covers {100 * found['int8_share_of_macs']:.1f} % of the MACs")
    shown = layers if every else sorted(layers, key=lambda layer: -layer.macs)[:_LAYERS]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("layer", "op", "output"):
        table.add_column(name, overflow="fold")
    for name in ("MMACs", "params", "act. KB", "precision"):
        table.add_column(name, justify="right")
    for layer in shown:
        shape = "x".join(str(side) for side in layer.shape)
        numbers = (f"{layer.macs / 1e6:.2f}", str(layer.params), f"{layer.activation_bytes / 1e3:.0f}")
        table.add_row(layer.name, layer.op, shape, *numbers, layer.precision)
    console.print_table(table)
    if len(shown) < len(layers):
        click.echo(f"the {len(shown)} layers with the most MACs of {len(layers)}; --all shows every one")
