"""`rdeploy doctor`: what works on this machine, and the exact fix for what does not; with a model, where it can be built."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rdeploy.cli import SETTINGS, State, console

_WORDS = {"pass": "PASS", "fail": "FAIL", "info": ""}


@click.command("doctor", context_settings=SETTINGS)
@click.argument("path", required=False, metavar="[BUNDLE|MODEL.onnx]")
@click.option(
    "--target", "names", multiple=True, metavar="NAME|FILE|auto", help="Can the model be built for it? Repeatable."
)
@click.option(
    "--ray", is_flag=True, help="Print what to start a Ray node with, so that it may measure for machines like it."
)
@console.as_json
@console.debug
@click.pass_obj
def command(state: State, path: str | None, names: tuple[str, ...], ray: bool, as_json: bool) -> int:
    """Build and run a tiny network on every backend; the exit code is 3 when none of them works.

    With a model: tell whether the TensorRT of each target, or of every release, can build it, and what is in the way. The
    exit code is 2 when it cannot be built for a target.
    """
    if ray:
        from rdeploy import environment

        click.echo(json.dumps({environment.measuring_resource(): 1}))
        return 0
    if path is not None:
        return _model(path, names, as_json=as_json)
    if names:
        raise click.UsageError("--target needs a model: rdeploy doctor MODEL.onnx --target NAME")
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


def _model(path: str, names: tuple[str, ...], *, as_json: bool) -> int:
    from rdeploy import bundle, preflight
    from rdeploy.errors import ConfigError

    onnx, graphs = Path(path), {}
    if bundle.is_bundle(path):
        folder = bundle.folder_of(path)
        onnx, manifest = folder / "model.onnx", bundle.read(folder)
        backends = [graph["backend"] for graph in manifest.get("graphs") or ()]
        graphs = {name: bundle.verified_graph(folder, manifest, name) for name in backends}
    if not onnx.is_file() or onnx.suffix != ".onnx":
        raise ConfigError(f"{path}: neither a bundle nor an ONNX file; `rdeploy build` makes a bundle of a model")
    found = preflight.verdicts(onnx, names, graphs)
    if as_json:
        console.print_json(found)
    else:
        width = max((len(one.title) + len(one.target) + 2 for one in found), default=0)
        for one in found:
            name = f"{one.target}, {one.title}" if one.target else one.title
            click.echo(
                f"{'FAIL' if one.obstacles else 'PASS':<4}  {name:<{width}}  {'; '.join(one.obstacles)}".rstrip()
            )
        if names and not found:
            click.echo(f"no TensorRT among the backends of {', '.join(names)}: the runtimes of CPUs take any graph")
    return 2 if names and any(one.obstacles for one in found) else 0
