"""`rdeploy profile BUNDLE|MODEL.onnx`: latency, throughput and memory of what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console

if TYPE_CHECKING:
    from rdeploy.types import EngineResult


@click.command("profile", context_settings=SETTINGS)
@click.argument("path", metavar="BUNDLE|MODEL.onnx")
@click.option("--backend", multiple=True, metavar="NAME", help="Only this engine; repeatable.")
@click.option(
    "--target", default="cpu", show_default=True, metavar="NAME|FILE|auto", help="How long to measure; what to build."
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--seed", type=int, default=0, show_default=True)
@console.as_json
@console.debug
@click.pass_obj
def command(state: State, /, path: str, as_json: bool, **options: Any) -> int:
    """Measure the engines of a bundle, or build engines of an ONNX file and measure those, interleaved."""
    from rdeploy import api

    with console.progress("measuring", verbose=state.debug):
        found = api.profile(path, **options)
    for one in found:
        if one.failure:
            console.warn(f"rdeploy profile: {one.backend}: {one.failure.message}")
    if as_json:
        console.print_json([_facts(one) for one in found])
    else:
        _print(found)
    if any(one.measurement for one in found):
        return 0
    return 3 if all(one.failure and one.failure.error == "MissingDependency" for one in found) else 1


def _facts(one: EngineResult) -> dict[str, Any]:
    from rdeploy import manifest

    measurement = manifest.measured(one.measurement) if one.measurement else None
    size_bytes = one.engine.size_bytes if one.engine else None
    return {"backend": one.backend, "size_bytes": size_bytes, "measurement": measurement, "failure": one.failure}


def _print(found: Sequence[EngineResult]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("backend")
    for name in ("p50 ms", "p90 ms", "p99 ms", "mean ms", "images/s", "peak MB", "size MB", "samples"):
        table.add_column(name, justify="right")
    for one in found:
        facts = _facts(one)
        if (measured := facts["measurement"]) is None:
            continue
        peak = measured["memory"]["process_peak"]
        times = (_text(measured[name]) for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms"))
        sizes = (_text(None if size is None else size / 1e6, 1) for size in (peak, facts["size_bytes"]))
        table.add_row(one.backend, *times, _text(measured["throughput_ips"], 1), *sizes, str(measured["samples"]))
    console.print_table(table)


def _text(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
