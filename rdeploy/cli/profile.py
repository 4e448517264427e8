"""`rdeploy profile BUNDLE|MODEL.onnx`: latency, throughput and memory of what is there, and on request much more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console

if TYPE_CHECKING:
    from rdeploy.results import EngineResult


@click.command("profile", context_settings=SETTINGS)
@click.argument("path", metavar="BUNDLE|MODEL.onnx")
@click.option("--backend", multiple=True, metavar="NAME", help="Only this engine; repeatable.")
@click.option(
    "--target", default="cpu", show_default=True, metavar="NAME|FILE|auto", help="How long to measure; what to build."
)
@click.option(
    "--batch", multiple=True, type=click.IntRange(min=1), metavar="N", help="Batch size; several make a sweep.  [1]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option(
    "--streams", multiple=True, type=click.IntRange(min=1), metavar="N", help="Throughput of N sessions; repeatable."
)
@click.option("--fps", type=float, help="Also at a camera's pace, beside back to back: what idling costs.")
@click.option("--layers", is_flag=True, help="Times by layer, from each runtime's own profiler.")
@click.option("--end-to-end", metavar="DIR", help="Also from image files to answers: decode, preprocess, infer.")
@click.option("--energy/--no-energy", default=True, help="Joules of a run, where there is a meter.  [on]")
@click.option(
    "--mlperf",
    multiple=True,
    type=click.Choice(["SingleStream", "Offline"]),
    help="Also by MLPerf's load generator; repeatable, needs --out.",
)
@click.option("--out", metavar="DIR", help="Keep all raw samples (profile.json) and MLPerf's logs here.")
@click.option("--seed", type=int, default=0, show_default=True)
@console.as_json
@console.debug
@click.pass_obj
def command(state: State, /, path: str, as_json: bool, **options: Any) -> int:
    """Measure the engines of a bundle, or build engines of an ONNX file and measure those, interleaved."""
    from rdeploy import api

    options["batch"] = options["batch"] or (1,)
    with console.progress("measuring", verbose=state.debug):
        found = api.profile(path, **options)
    for one in found:
        if one.failure:
            console.warn(f"rdeploy profile: {one.backend}: {one.failure.message}")
    if as_json:
        console.print_json([_facts(one) for one in found])
    else:
        _show(found)
    if any(one.measurement for one in found):
        return 0
    return 3 if all(one.failure and one.failure.error == "MissingDependency" for one in found) else 1


def _facts(one: EngineResult) -> dict[str, Any]:
    """Return everything: what is derived as in a manifest, and the raw samples."""
    from rdeploy import manifest

    return {
        "backend": one.backend,
        "size_bytes": one.engine.size_bytes if one.engine else None,
        "measurement": manifest.measured(one.measurement) if one.measurement else None,
        "raw": one.measurement,
        "failure": one.failure,
    }


def _show(found: Sequence[EngineResult]) -> None:
    from rdeploy.report import profile as report

    measured = [one for one in found if one.measurement]
    if not measured:
        return
    for title, table in report.tables(measured):
        if title:
            click.echo(f"\n{title}")
        console.print_table(table)
    for line in report.remarks(measured):
        console.warn(line)
