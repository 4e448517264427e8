"""`rdeploy evaluate BUNDLE --data PATH`: the task's metric with its interval, and agreement with another bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rdeploy.cli import SETTINGS, State, console

if TYPE_CHECKING:
    from rdeploy.results import Accuracy, Verification


@click.command("evaluate", context_settings=SETTINGS)
@click.argument("path", metavar="BUNDLE")
@click.option(
    "--data",
    required=True,
    metavar="PATH",
    help="Class folders, a CSV of path,label, arrays (.npz), or images/ and masks/.",
)
@click.option("--void", type=int, multiple=True, metavar="N", help="A mask's value that is no class, besides 255.")
@click.option("--against", metavar="BUNDLE", help="The bundle to agree with, usually the native FP32 one.")
@click.option("--backend", metavar="NAME", help="Run this engine of the bundle.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many images, a seeded sample.")
@click.option("--seed", type=int, default=0, show_default=True)
@console.as_json
@console.debug
@click.pass_obj
def command(state: State, /, path: str, as_json: bool, **options: Any) -> int:
    """Score a bundle on images. Fails with exit code 1 when its outputs have collapsed."""
    from rdeploy import api

    with console.progress("evaluating", verbose=state.debug):
        found = api.evaluate(path, **options)
    for reason in found.reasons:
        console.warn(f"rdeploy evaluate: {reason}")
    if as_json:
        console.print_json(found)
    else:
        _print(found)
    return 0 if found.passed else 1


_NAMES = {"top1": "top-1", "miou": "mIoU", "map": "mAP"}


def _print(found: Verification) -> None:
    if found.accuracy:
        click.echo(f"{_NAMES[found.accuracy.metric]:<11}{_share(found.accuracy)}")
        if found.agreement:
            click.echo(
                f"reference  {100 * found.accuracy.reference:.1f} %  (drop {100 * found.accuracy.drop:+.1f} points)"
            )
    if found.agreement:
        click.echo(f"{found.agreement.metric:<11}{_share(found.agreement)}")
    click.echo(f"executed by {found.executed_by}")


def _share(accuracy: Accuracy) -> str:
    low, high = accuracy.ci95
    if accuracy.metric == "cosine":
        return f"{accuracy.value:.4f}  [{low:.4f}, {high:.4f}]  ({accuracy.samples} images)"
    return f"{100 * accuracy.value:.1f} %  [{100 * low:.1f}, {100 * high:.1f}]  ({accuracy.samples} images)"
