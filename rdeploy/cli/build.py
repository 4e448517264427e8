"""`rdeploy build MODEL`: the options become a request, the result becomes a table or JSON, and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console, model_options
from rdeploy.types import EXPECTED

if TYPE_CHECKING:
    from rich.table import Table

    from rdeploy.report.markdown import Row
    from rdeploy.results import BuildResult


_VARIANTS = (
    click.option(
        "--scale", type=float, multiple=True, metavar="F", help="Fraction of the native side, 0 < F <= 1; repeatable."
    ),
    click.option(
        "--resolution", multiple=True, metavar="N|HxW", help="Input size in pixels instead of --scale; repeatable."
    ),
    click.option(
        "--at",
        multiple=True,
        metavar="PLACE",
        help="Where the resolution is reduced: input (the default), stem, after:MODULE, patch, tokens; repeatable. Joined by "
        "+ they are used together, and @ gives one a scale of its own: input@0.75+tokens@0.8.",
    ),
    click.option("--fp32", is_flag=True, help="Build an FP32 variant (the default when no precision is named)."),
    click.option("--fp16", is_flag=True, help="Build an FP16 variant."),
    click.option("--int8", is_flag=True, help="Build an INT8 variant; needs --calib."),
    click.option(
        "--calib", metavar="PATH|pkg:fn", help="Your own images for the INT8 ranges ('random' only for speed tests)."
    ),
    click.option("--calib-samples", type=int, default=256, show_default=True, help="At most so many of them."),
    click.option("--calibrator", default="auto", show_default=True, help="How ranges are chosen."),
    click.option(
        "--recipe",
        default="auto",
        show_default=True,
        help="What INT8 tries: by kind of network, or fast, scores, attention (its products as well), thorough (minutes).",
    ),
    click.option(
        "--data", metavar="PATH", help="Labelled images: class folders, a CSV of path,label, or images/ and masks/."
    ),
    click.option(
        "--void", type=int, multiple=True, metavar="N", help="A mask's value that is no class, besides 255; repeatable."
    ),
)
_DEPLOYMENT = (
    click.option("--target", default="cpu", show_default=True, metavar="NAME|FILE|auto", help="See `rdeploy targets`."),
    click.option("--backend", multiple=True, metavar="NAME", help="Instead of the target's backends; repeatable."),
    click.option(
        "--batch", type=int, multiple=True, metavar="N", help="Instead of the target's batch sizes; repeatable."
    ),
    click.option(
        "--embed-preprocess", is_flag=True, help="Take uint8 (N, H, W, C) pictures of the native size; resize inside."
    ),
    click.option(
        "--adapt",
        metavar="auto|full|none",
        help="Search crop, filter and BatchNorm statistics for each lower resolution, with 128 images or more; full: however "
        "long it takes (build: auto, optimize: none).",
    ),
    click.option(
        "--finetune",
        metavar="DIR",
        help="Train each lower resolution to answer as the native model; labels not needed.",
    ),
    click.option("--finetune-epochs", type=int, metavar="N", help="Instead of as many as suit the number of images."),
    click.option("--finetune-batch", type=int, metavar="N", help="Images for each step of the training (64)."),
    click.option(
        "--finetune-optimizer", metavar="adamw|sgd", help="adamw (the default), or sgd: for CNNs and long trainings."
    ),
    click.option("--finetune-rate", type=float, metavar="F", help="Its highest learning rate (0.0005; sgd: 0.05)."),
    click.option("--out", default=".", show_default=True, metavar="DIR", help="Where the bundles go."),
    click.option("--seed", type=int, default=0, show_default=True),
)


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every option of a build."""
    for option in reversed((*_VARIANTS, *model_options.OPTIONS, *_DEPLOYMENT, console.as_json, console.debug)):
        function = option(function)
    return function


@click.command("build", context_settings=SETTINGS)
@click.argument("model", metavar="MODEL")
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="What INT8 may cost against FP32 (of the task's metric with --data, else of the decisions); the layers that hurt "
    "most stay in float until it holds.",
)
@with_options
@click.pass_obj
def command(state: State, /, model: str, as_json: bool, **options: Any) -> int:
    """Build variants of MODEL and measure them beside the untouched native FP32 model.

    MODEL is timm:NAME, torchvision:NAME, hf:NAME, package.module:factory, or a file: .pt .pth .safetensors (with --arch), .pt2,
    TorchScript, .onnx.
    """
    from rdeploy import api

    options["arch_kwargs"] = dict(options["arch_kwargs"])
    with console.progress("starting", verbose=state.debug) as show:
        result = api.build(model, command=state.command, progress=show, **options)  # type: ignore[arg-type]
    if as_json:
        console.print_json(_document(result))
    else:
        _print(result)
    return _exit_code(result)


def _document(result: BuildResult) -> dict[str, Any]:
    from rdeploy import manifest

    rows = [
        {"id": row.variant.id, "status": row.status, "bundle": row.bundle, "manifest": manifest.manifest(result, row)}
        for row in result.variants
    ]
    return {"schema_version": manifest.SCHEMA_VERSION, "variants": rows, "timings_s": dict(result.timings_s)}


def _print(result: BuildResult) -> None:
    from rdeploy.report import ladder, markdown, precision

    console.print_table(_table(result))
    for doubt in markdown.doubts(result):
        console.warn(doubt)
    for row in result.variants:
        for note in row.notes:
            console.warn(f"{row.variant.id}: {note}")
    for note in result.notes:
        if not note.startswith(EXPECTED):  # told before the work began
            console.warn(note)
    for line in (*ladder.sentences(result), *ladder.verdicts(result)):
        console.warn(line)
    for line in (*precision.recommendations(result), *precision.fallbacks(result)):
        console.warn(line)
    for row in result.variants:
        if row.bundle:
            click.echo(f"{row.variant.id}: {row.bundle}")


def _table(result: BuildResult) -> Table:
    from rich.table import Table

    from rdeploy.report import markdown

    columns = _COLUMNS if console.width() >= _WIDE else {name: _COLUMNS[name] for name in _COLUMNS if name not in _LESS}
    task = result.spec.task
    agreed = "cosine %" if task == "embedding" else "agrees %"
    heads = {"accuracy": f"{markdown.METRICS[task]}\n[95 %]", "agreement": f"{agreed}\n[95 %]"}
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name, (head, width) in columns.items():
        text = name in ("variant", "backend", "verdict")
        table.add_column(heads.get(name, head), justify="left" if text else "right", overflow="fold", min_width=width)
    for row in markdown.table(result):
        table.add_row(*(_cell(row, name) for name in columns))
    return table


def _cell(row: Row, name: str) -> str:
    if name == "speedup":
        return row.status or f"{row.speedup}\n{row.interval}".strip()
    value: str = getattr(row, name)
    if name == "verdict":
        return value.replace(" ", "\n").replace("-", "-\n")
    if name == "backend" and row.executed:
        return f"{value}\n({row.executed})"
    return value.replace(" [", "\n[")


_WIDE = 96
_COLUMNS = {
    "variant": ("variant", 7),
    "backend": ("backend", 8),
    "p50_ms": ("p50\nms", 5),
    "speedup": ("speed-up\n[95 %]", 12),
    "memory_mb": ("peak\nMB", 5),
    "size_mb": ("size\nMB", 5),
    "gmacs": ("GMACs", 5),
    "accuracy": ("top-1 %\n[95 %]", 12),
    "agreement": ("agrees %\n[95 %]", 12),
    "parity_db": ("parity\ndB", 6),
    "verdict": ("verdict", 7),
}
_LESS = ("size_mb", "gmacs", "parity_db", "verdict")
"""Left out on a narrow terminal; the report has them."""


def _exit_code(result: BuildResult) -> int:
    """Return 1 when a variant or an engine failed, 2 when what was asked for cannot be done, else 0; say why in a line."""
    from rdeploy import manifest
    from rdeploy.report import markdown

    for name, failure in markdown.failures(result):
        again = failure.reproduce and f" (again with: {failure.reproduce})"
        console.warn(f"rdeploy build: {name}: {failure.stage}: {failure.message}{again}")
    rows = (result.baseline, *result.variants)
    lost = [one for row in rows for one in row.engines if one.failure is not None or manifest.failed(one)]
    if lost or any(row.status == "failed" for row in rows):
        return 1
    return 2 if any(row.status == "unsupported" for row in result.variants) else 0
