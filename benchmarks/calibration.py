"""What each calibrator costs: peak memory and time of watching N images and finding every range.

    python benchmarks/calibration.py --data photos/ [--images 500] [--out benchmarks/results/calibration.md]

Each calibrator runs in a process of its own, twice (a second, interleaved round shows the noise; the table has the faster).
Memory is the process's peak above what it held before the first image. Goals: entropy and percentile at most 1.3 times
min-max's memory and 2.5 times its time, and no growth from 125 to 500 images.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import networks
import numpy as np

from rdeploy import backends, memory, targets
from rdeploy.plugins import make_options
from rdeploy.quantize import calibrators, recipe
from rdeploy.quantize.ranges import find_ranges

NETWORKS = ("efficientnet_lite0@224", "mobilenet_v2@224")


def cost(name: str, calibrator: str, images: int, data: Path, work: Path) -> tuple[float, int, int]:
    """Return (seconds, peak bytes, peak bytes above the start) of calibrating with `images` images."""
    network = networks.load(name, data=data, work=work)
    batches = networks.Batches(network.pixels, np.arange(images) % len(network.pixels), network.spec.preprocessing)
    scheme = backends.find("onnxruntime").scheme(targets.load("cpu"))
    recipe.observe_for(network.graph, [scheme], [batches[0]])
    before = memory.rss_bytes()
    memory.reset_peak()
    start = time.perf_counter()
    histograms = recipe.observe_for(network.graph, [scheme], batches)
    options = make_options(calibrators.find(calibrator).Options, {}, where=calibrator)
    for symmetric in (False, True):
        find_ranges(histograms, calibrator=calibrator, options=options, symmetric=symmetric)
    seconds = time.perf_counter() - start
    peak = memory.peak_bytes()
    return seconds, peak, peak - before


def measured(name: str, calibrator: str, images: int, arguments: argparse.Namespace) -> tuple[float, int, int]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(cost, name, calibrator, images, arguments.data, arguments.work).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the labelled photographs (a folder with labels.csv)")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="downloads and graphs are kept here")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--network", action="append", help=f"one of {', '.join(NETWORKS)}; repeatable")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    lines = ["# What calibration costs", "", __doc__.split("\n\n")[2].replace("\n", " "), "", networks.machine(), "",
             "| network | images | calibrator | seconds | of min-max's | peak MB | of min-max's |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    for name in arguments.network or NETWORKS:
        networks.load(name, data=arguments.data, work=arguments.work)
        for images in (arguments.images // 4, arguments.images):
            found: dict[str, tuple[float, int, int]] = {}
            for _ in range(2):
                for calibrator in calibrators.names():
                    now = measured(name, calibrator, images, arguments)
                    found[calibrator] = min(found.get(calibrator, now), now)
            base = found["minmax"]
            for calibrator, (seconds, peak, _) in found.items():
                lines.append(
                    f"| {name} | {images} | {calibrator} | {seconds:.1f} | {seconds / base[0]:.2f} | {peak / 2**20:.0f} | "
                    f"{peak / base[1]:.2f} |"
                )
                print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
