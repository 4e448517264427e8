"""What calibration costs: seconds and peak memory of rdeploy's default recipe and of the peers, on 256 and on 2,048 images.

    python benchmarks/int8/cost.py --data data/ [--network efficientnet_lite0@224] [--tool rdeploy] [--images 256 --images 2048]

Each tool quantizes in a process of its own that reads one image after the other from a file; seconds are those of quantizing
alone, without imports, memory is the peak of the whole process. Where there are fewer photographs than images, mirrored and
shifted copies fill up. A peer that keeps every image is not run on 2,048. Needs a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cases
import networks
import numpy as np
import tools

from rdeploy.data import preprocess

CONFIGS = {"rdeploy": "affine auto", "ort": "u8 min-max", "nncf": "mixed", "modelopt": "max", "aimet": "u8 CLE+min_max"}
KEEP_ALL = ("modelopt", "aimet")
MOST_SECONDS, MOST_RATIO = 60, 1.2
HEAD = "| network | tool | images | seconds | peak GB |"


def calibration(network: networks.Network, count: int, work: Path) -> Path:
    """Write `count` normalised images to a file, copies that are mirrored and shifted behind the photographs themselves."""
    path = work / f"{network.name}-{count}.npy"
    if path.is_file():
        return path
    rng = np.random.default_rng(0)
    shape = (count, 3, *network.pixels.shape[1:3])
    made = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape, version=(1, 0))
    for index in range(count):
        pixels = network.pixels[network.order[index % len(network.order)]]
        for _ in range(index // len(network.order)):
            pixels = np.roll(pixels[:, ::-1], rng.integers(-20, 20, 2), axis=(0, 1))
        made[index] = preprocess.normalise(pixels[None], network.spec.preprocessing)[0]
    made.flush()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder that holds photos/")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="downloads and graphs are kept here")
    parser.add_argument("--environments", type=Path, default=Path("out/environments"), help="the peers' environments")
    parser.add_argument("--network", default="efficientnet_lite0@224")
    parser.add_argument("--tool", action="append", choices=CONFIGS, help="only this one; repeatable")
    parser.add_argument("--images", type=int, action="append", help="256 and 2,048 when none is given")
    parser.add_argument("--out", type=Path, help="write the page to this file as well")
    given = parser.parse_args()
    work = given.work.absolute()
    places = cases.Places(given.data, given.work, given.work, work)
    network = cases.load(given.network, places)
    about = __doc__.split("\n\n")[2].replace("\n", " ").strip()
    lines = ["# What calibration costs", "", about, "", networks.machine(), "", HEAD, "|---" * 5 + "|"]
    print("\n".join(lines), flush=True)
    peaks: dict[str, list[float]] = {}
    for tool in given.tool or CONFIGS:
        python = tools.python(tool, given.environments.absolute())
        for count in given.images or (256, 2048):
            if count > 256 and tool in KEEP_ALL:
                continue
            if isinstance(python, str):
                lines.append(f"| {network.name} | {tool} | {python} | | |")
                break
            files = network.graph, calibration(network, count, work), work / "cost.onnx"
            said = json.loads(
                tools.run(tool, python, CONFIGS[tool], files, transformer="vit" in given.network, limit_s=3600)
            )
            peaks.setdefault(tool, []).append(said["peak_bytes"])
            seconds, peak = said["seconds"], said["peak_bytes"] / 2**30
            lines.append(f"| {network.name} | {tool} {said['version']} | {count} | {seconds:.0f} | {peak:.2f} |")
            print(lines[-1], flush=True)
    ours, peers = (
        peaks.get("rdeploy"),
        [peak for tool, found in peaks.items() if tool != "rdeploy" for peak in found[:1]],
    )
    if ours and peers:
        lines += [
            "",
            f"rdeploy's peak over the leanest peer's: {ours[0] / min(peers):.2f} (goal: at most {MOST_RATIO:g}).",
        ]
        lines[-1] += (
            f" Over its own on the fewest images: {ours[-1] / ours[0]:.2f}. Goal for 256 images: {MOST_SECONDS} s."
        )
        print(lines[-1])
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
