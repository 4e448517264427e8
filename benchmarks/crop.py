"""What crop and filter are worth at a lower resolution, and whether the search finds it: EfficientNet-Lite0, no training.

    python benchmarks/crop.py --data photos/ [--side 192 --side 160] [--splits 4] [--out TABLE.md]

The first table has the top-1 accuracy of every crop, with the model's own filter, and the best of all crops and filters. The
second shows what `rdeploy build` would do: half of the photographs, without their labels, choose the preprocessing by its
likeness to the native model at 224; the other half, with labels, shows what that is worth. Several seeded halves tell how much
of it is chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import networks
import numpy as np

from rdeploy.adapt import Choosing, Subject, answers_of, preprocessing
from rdeploy.data import images as image_files
from rdeploy.data import preprocess
from rdeploy.metrics.closeness import closeness
from rdeploy.quantize.ranges import activations
from rdeploy.types import Preprocessing

NATIVE = 224
CROPS = (0.75, 0.8, 0.85, 0.875, 0.9, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Photographs by row, brought to one side under several preprocessings."""

    images: image_files.ImageSet
    side: int

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, preprocessings: Sequence[Preprocessing], rows: Sequence[int]) -> list[np.ndarray]:
        return preprocess.prepare_each(self.images.subset(rows), (self.side, self.side), preprocessings)


def runner(network: networks.Network) -> Any:
    def run(pixels: np.ndarray) -> Iterator[Sequence[np.ndarray]]:
        batches = networks.Batches(pixels, np.arange(len(pixels)), network.spec.preprocessing)
        for values in activations(network.graph, ["output"], batches):
            yield [values["output"]]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs with labels.csv")
    parser.add_argument("--side", type=int, action="append")
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--work", type=Path, help="where graphs are kept")
    parser.add_argument("--out", type=Path, help="the table's file; on the screen without")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rdeploy-crop-") as folder:
        text = tables(arguments, arguments.work or Path(folder))
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


def tables(arguments: argparse.Namespace, work: Path) -> str:
    images = image_files.collect(
        arguments.data / "labels.csv", labelled=True, class_names=[str(i) for i in range(1000)]
    )
    labels = list(images.labels or ())
    native = networks.load(f"efficientnet_lite0@{NATIVE}", data=arguments.data, work=work)
    spec, known = native.spec, native.spec.preprocessing
    (pixels,) = Pictures(images, NATIVE).pixels([known], range(len(images)))
    answers = answers_of(runner(native), pixels, spec)
    top1 = closeness(answers, answers, task="classification", labels=labels).share
    grid = [
        f"| side | {' | '.join(f'crop {crop:g}' for crop in CROPS)} | best of all, with its filter |",
        "|---" * 9 + "|",
    ]
    found = ["| side | chosen on | crop and filter | plain top-1 % | chosen top-1 % | gain |", "|---" * 6 + "|"]
    for side in arguments.side or (192, 160):
        network = networks.load(f"efficientnet_lite0@{side}", data=arguments.data, work=work)
        pictures, run = Pictures(images, side), runner(network)
        one = Subject(
            name=f"r{side}", spec=spec, resolution=(side, side), preprocessing=known, module=None, native=None, run=run,
            choosing=Choosing(pictures=pictures, native=answers),
        )  # fmt: skip
        correct = accuracies(one, labels)
        plain = [correct[dataclasses.replace(known, crop_pct=crop)].mean() for crop in CROPS]
        best = max(correct, key=lambda how: correct[how].mean())
        cells = " | ".join(f"{100 * value:.1f}" for value in plain)
        grid.append(
            f"| {side} | {cells} | {100 * correct[best].mean():.1f}, {preprocessing.described(best, known) or 'plain'} |"
        )
        found += [choice(one, correct, images, answers, seed) for seed in range(arguments.splits)]
    head = (
        f"EfficientNet-Lite0, {len(images)} photographs: {100 * top1:.1f} % top-1 at {NATIVE} with crop 0.875, bicubic."
    )
    return "\n".join([head, "", *grid, "", *found, "", networks.machine()]) + "\n"


def accuracies(one: Subject, labels: Sequence[int]) -> dict[Preprocessing, np.ndarray]:
    """Return for every candidate which images it decides right."""
    options = preprocessing.Options(crop_pcts=CROPS)
    candidates = preprocessing.candidates(one, options)
    rows, found = range(len(labels)), {}
    for how in dict.fromkeys([one.preprocessing, *candidates]):
        (pixels,) = one.choosing.pictures.pixels([how], rows)
        mine = answers_of(one.run, pixels, one.spec)
        found[how] = closeness(mine, mine, task="classification", labels=labels).decided
    return found


def choice(
    one: Subject,
    correct: dict[Preprocessing, np.ndarray],
    images: image_files.ImageSet,
    answers: Sequence[np.ndarray],
    seed: int,
) -> str:
    """Let the step choose on one half, and return how the choice does on the other."""
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    half, rest = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])
    choosing = Choosing(
        pictures=dataclasses.replace(one.choosing.pictures, images=images.subset(half)),
        native=[answers[row] for row in half],
    )
    change = preprocessing.apply(dataclasses.replace(one, choosing=choosing, seed=seed), preprocessing.Options())
    chosen = one.preprocessing if change is None or change.preprocessing is None else change.preprocessing
    before, after = (100 * correct[how][rest].mean() for how in (one.preprocessing, chosen))
    what = "nothing better" if change is None else change.detail
    return f"| {one.resolution[0]} | half {seed} | {what} | {before:.1f} | {after:.1f} | {after - before:+.1f} |"


if __name__ == "__main__":
    main()
