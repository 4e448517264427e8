"""Bits against resolution: how close a network stays to FP32 with 8, 4 and 2 bits, at several input sizes.

    python benchmarks/int8/bits.py --data photos/ [--network mobilenet_v2] [--side 224 --side 168 --side 128] [--out TABLE.md]

W are the bits of weights, A those of activations. Fewer than 8 are simulated: the integers of an ordinary Q/DQ graph are held
within +-7 or +-1, activations by a Clip in front of the pair, and the graph is evaluated in float. No runtime here executes
them faster than INT8. "rounding" is the recipe: `fast` rounds to nearest and corrects biases, `thorough` learns block by block.
SQNR is over the logits, against FP32 at that size. So that sizes compare: agreement is that with FP32 at the first size, the
native one (in brackets: at that size), top-1 is on the labels, "weights MB" what they take with so many bits each, and GMACs
what an image costs. FP32 itself is the first line of each size.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks

from rdeploy import backends, targets
from rdeploy.graph import cost
from rdeploy.quantize import recipe
from rdeploy.quantize.ranges import activations
from rdeploy.types import QuantOptions

CLASSES = 1000
BITS = ((8, 8), (4, 8), (4, 4), (2, 8), (2, 4))
"""Of weights and of activations."""


def outputs(graph: Path, images: networks.Batches) -> np.ndarray:
    import onnx_ir as ir

    name = ir.load(graph).graph.outputs[0].name or ""
    rows = np.concatenate([values[name] for values in activations(graph, [name], images)])
    return (rows[:, 1:].mean(axis=1) if rows.ndim == 3 else rows).astype(np.float64)


def chosen_rows(network: networks.Network, images: int) -> np.ndarray:
    """Return the rows of the photographs that score: they are the same at every size."""
    return network.order[images : 3 * images]


def line(network: networks.Network, bits: str, weights: int, found: np.ndarray, exact: np.ndarray, truth: dict) -> str:
    """Return one line of the table; `truth` holds the labels and what FP32 decides at the native size."""
    total, noise = cost.summarize(network.graph), np.square(exact - found).sum()
    sqnr = 10 * np.log10(np.square(exact).sum() / noise) if noise else float("inf")
    decided, native, labels = found.argmax(1), truth["native"], truth["labels"]
    top1 = f"{(decided == labels).mean():.1%}" if exact.shape[1] == CLASSES else "–"
    same = f"{(decided == native).mean():.1%} ({(decided == exact.argmax(1)).mean():.1%})"
    return (
        f"| {network.name} | {bits} | {sqnr:.1f} | {same} | {top1} | "
        f"{total.params * weights / 8e6:.2f} | {total.macs / 1e9:.2f} |"
    )


def rows(network: networks.Network, images: int, chosen: str, truth: dict) -> list[str]:
    """Return a line of the table for each number of bits at one resolution."""
    calibration = networks.Batches(network.pixels, network.order[:images], network.spec.preprocessing)
    scoring = networks.Batches(network.pixels, chosen_rows(network, images), network.spec.preprocessing)
    exact, lines = outputs(network.graph, scoring), []
    scheme = backends.find("reference").scheme(targets.load("cpu"))
    with tempfile.TemporaryDirectory(prefix="rdeploy-bits-") as folder:
        out = Path(folder) / "out.onnx"
        for bits, activation_bits in BITS:
            name = f"W{bits}A{activation_bits}"
            narrow = dataclasses.replace(
                scheme, name=name.lower(), weight_max=2 ** (bits - 1) - 1, activation_bits=activation_bits
            )
            seen = recipe.calibrate(network.graph, Path(folder), schemes=[narrow], images=calibration, recipe=chosen)
            recipe.quantize(seen, out, scheme=narrow, images=calibration, options=QuantOptions())
            found = outputs(out, scoring)
            executed = "executed" if bits == activation_bits == 8 else "simulated"
            lines.append(line(network, f"{name} {chosen}, {executed}", bits, found, exact, truth))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the labelled photographs (a folder with labels.csv)")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="downloads and graphs are kept here")
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--side", type=int, action="append", help="input sizes; 224, 168 and 128 when none is given")
    parser.add_argument("--images", type=int, default=128, help="how many calibrate; twice as many others score")
    parser.add_argument("--recipe", action="append", help="fast and thorough when none is given")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    lines = ["# Bits and resolution", "", __doc__.split("\n\n")[2].replace("\n", " "), "", networks.machine(), "",
             "| network | bits, rounding | SQNR dB | agreement with native | top-1 | weights MB | GMACs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    truth: dict = {}
    for side in arguments.side or (224, 168, 128):
        network = networks.load(f"{arguments.network}@{side}", data=arguments.data, work=arguments.work)
        scored = chosen_rows(network, arguments.images)
        exact = outputs(network.graph, networks.Batches(network.pixels, scored, network.spec.preprocessing))
        truth = truth or {"native": exact.argmax(1), "labels": network.labels[scored]}
        lines.append(line(network, "FP32", 32, exact, exact, truth))
        print(lines[-1], flush=True)
        for chosen in arguments.recipe or ("fast", "thorough"):
            for one in rows(network, arguments.images, chosen, truth):
                lines.append(one)
                print(one, flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
