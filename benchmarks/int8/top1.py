"""What INT8 costs in top-1, told apart from luck: several calibrations of a network, at native size and at 0.75.

    python benchmarks/int8/top1.py --data photos/ --work work/ [--network mobilenet_v2@224] [--out PAGE.md]

`compare.py` quantizes once and scores 372 photographs, of which one is 0.27 points. Here the photographs are cut into four parts
(seeded), each calibrates once and the three others score, so that four quantizations are judged on three times all the
photographs. The interval is the bootstrap's over photographs, each with all of its decisions: they are the sample, not the
decisions. A row at 0.75 comes with how much more INT8 loses there than at native size, photograph by photograph.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
import networks
import score

from rdeploy import backends, targets
from rdeploy.metrics.intervals import mean_interval
from rdeploy.quantize import recipe
from rdeploy.types import QuantOptions

NETWORKS = ("efficientnet_lite0@224", "efficientnet_lite1@240", "mobilenet_v2@224")
SCHEMES = {"affine": "onnxruntime", "symmetric": "tensorrt_rtx"}
PARTS = 4
HEAD = (
    "| network | scheme | top-1 FP32 | INT8 | loss (95 % interval) | at most 0.5 | more than at native | not larger |"
)


def quantized(network: networks.Network, scheme: str, images: networks.Batches, out: Path) -> None:
    """Quantize with the default recipe, weights of 8 bits whatever this CPU has."""
    given = dataclasses.replace(backends.find(SCHEMES[scheme]).scheme(targets.load("cpu")), weight_max=127)
    seen = recipe.calibrate(network.graph, out.parent, schemes=[given], images=images)
    recipe.quantize(seen, out, scheme=given, images=images, options=QuantOptions())


def lost(network: networks.Network, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """Return, by photograph, whether FP32 decides rightly and the share of quantizations that do less of it (-1 to 1)."""
    everything = networks.Batches(network.pixels, np.arange(len(network.pixels)), network.spec.preprocessing)
    right = score.outputs(network.graph, everything).argmax(1) == network.labels
    parts = np.array_split(np.random.default_rng(networks.SEED).permutation(len(network.pixels)), PARTS)
    found = np.zeros(len(network.pixels))
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="rdeploy-top1-") as folder:
            out = Path(folder) / "int8.onnx"
            quantized(network, scheme, networks.Batches(network.pixels, part, network.spec.preprocessing), out)
            others = np.setdiff1d(np.arange(len(network.pixels)), part)
            images = networks.Batches(network.pixels, others, network.spec.preprocessing)
            found[others] += score.outputs(out, images).argmax(1) == network.labels[others]
    return right, right - found / (PARTS - 1)


def row(cell: dict, native: dict | None) -> str:
    """Return one row of the table; a network at 0.75 of its side is compared with itself at native size."""
    loss, right = 100 * np.array(cell["lost"]), np.array(cell["right"])
    parts = [
        cell["network"], cell["scheme"], f"{100 * right.mean():.1f} %", f"{100 * right.mean() - loss.mean():.1f} %",
        _points(loss), _verdict(loss.mean() <= 0.5, mean_interval(loss)[0] <= 0.5),
    ]  # fmt: skip
    more = None if native is None else loss - 100 * np.array(native["lost"])
    parts += ["–", "–"] if more is None else [_points(more), _verdict(more.mean() <= 0, mean_interval(more)[0] <= 0)]
    return f"| {' | '.join(parts)} |"


def _points(by_image: np.ndarray) -> str:
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(float(by_image.mean()), *mean_interval(by_image))


def _verdict(reached: bool, possible: bool) -> str:
    return "reached" if reached else "missed, within the interval" if possible else "MISSED"


def main() -> None:
    """Measure what is not in --cells yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of photographs")
    parser.add_argument("--work", type=Path, required=True, help="where graphs are kept")
    parser.add_argument("--network", action="append", help="only this network, at both of its sizes; repeatable")
    parser.add_argument("--cells", type=Path, default=Path("top1.jsonl"), help="what was measured, one line a cell")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    given = parser.parse_args()
    cells = [json.loads(line) for line in given.cells.read_text().splitlines()] if given.cells.is_file() else []
    for native in given.network or NETWORKS:
        for name in (native, cases.SMALLER[native]):
            for scheme in SCHEMES:
                if any(cell["network"] == name and cell["scheme"] == scheme for cell in cells):
                    continue
                right, loss = lost(networks.load(name, data=given.data, work=given.work), scheme)
                cells.append({"network": name, "scheme": scheme, "right": right.tolist(), "lost": loss.tolist()})
                with given.cells.open("a") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
    known = {(cell["network"], cell["scheme"]): cell for cell in cells}
    natives = {small: native for native, small in cases.SMALLER.items()}
    lines = ["# What INT8 costs in top-1", "", __doc__.split("\n\n")[2].replace("\n", " "), "",
             f"Default recipe, {PARTS} calibrations each. {networks.machine()}.", "", HEAD, "|" + "---|" * 8]  # fmt: skip
    lines += [row(cell, known.get((natives.get(name, ""), scheme))) for (name, scheme), cell in known.items()]
    print("\n".join(lines))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
