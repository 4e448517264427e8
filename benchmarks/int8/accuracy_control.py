"""Accuracy control: how many layers fall back, at what cost, against NNCF's `quantize_with_accuracy_control`.

    python benchmarks/int8/accuracy_control.py --data photos/ [--network mobilenet_v2@224] [--max-drop 2] [--images 128]

Both calibrate on the same photographs and are judged on them, by the share that is decided otherwise than by FP32 (for the
ViT: by its largest mean patch feature). "Evaluations" counts graphs judged, "images run" every image of every evaluation; "held
out" is the same drop on photographs that nobody has seen. OpenVINO scheme; NNCF runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks
from peak import peak_bytes

from rdeploy import backends, targets
from rdeploy.quantize import mixed, recipe, sensitivity
from rdeploy.quantize.ranges import activations
from rdeploy.types import QuantOptions

NETWORKS = ("mobilenet_v2@224", "efficientnet_lite0@224", "vit_s14@224")
HEAD = (
    "| network | tool | points allowed | fallbacks | drop | held out | evaluations | images run | seconds | peak GB |"
)


def features(graph: Path, images: networks.Batches) -> np.ndarray:
    """Return what is decided by: logits, or a ViT's mean patch feature."""
    import onnx_ir as ir

    name = ir.load(graph).graph.outputs[0].name
    rows = np.concatenate([values[name] for values in activations(graph, [name], images)])
    return rows[:, 1:].mean(axis=1) if rows.ndim == 3 else rows


def ours(name: str, data: Path, work: Path, count: int, max_drop: float) -> dict[str, float]:
    """Run rdeploy's accuracy control in a process of its own, so that its peak memory is its own."""
    network = networks.load(name, data=data, work=work)
    scheme = backends.find("openvino").scheme(targets.load("cpu"))
    seen = networks.Batches(network.pixels, network.order[:count], network.spec.preprocessing)
    unseen = networks.Batches(network.pixels, network.order[count:], network.spec.preprocessing)
    start = time.perf_counter()
    exact = features(network.graph, seen).argmax(axis=1)

    def drop(graph: Path, images: networks.Batches = seen, truth: np.ndarray = exact) -> float:
        return 100 * float(np.mean(features(graph, images).argmax(axis=1) != truth))

    with tempfile.TemporaryDirectory(prefix="rdeploy-control-") as folder:
        out = Path(folder) / "int8.onnx"
        calibration = recipe.calibrate(network.graph, Path(folder), schemes=[scheme], images=seen)
        pinned = recipe.Pinned()

        def requantize(keep_float: tuple[str, ...]):
            options = QuantOptions(keep_float=keep_float)
            return recipe.quantize(calibration, out, scheme=scheme, images=seen, options=options, pinned=pinned)

        made = mixed.control(
            network.graph, out, scheme=scheme, images=seen, requantize=requantize,
            judge=mixed.Judge(drop, count, False), max_drop=max_drop,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        peak = peak_bytes()
        held_out = drop(out, unseen, features(network.graph, unseen).argmax(axis=1))
    found = made.fallbacks
    last = next(point for point in found.curve if point.layers == len(found.layers))
    gradients = sensitivity.IMAGES if found.candidates else 0
    return {
        "fallbacks": len(found.layers), "drop": last.drop, "held_out": held_out, "calls": found.evaluations,
        "images": found.evaluations * count + gradients, "seconds": seconds, "peak_bytes": peak,
    }  # fmt: skip


def nncf(name: str, data: Path, work: Path, count: int, max_drop: float, python: Path) -> dict[str, float]:
    """Run NNCF's accuracy control on the same graph and images, and judge its result as ours."""
    import openvino

    network = networks.load(name, data=data, work=work)
    seen = networks.Batches(network.pixels, network.order[:count], network.spec.preprocessing)
    unseen = networks.Batches(network.pixels, network.order[count:], network.spec.preprocessing)
    with tempfile.TemporaryDirectory(prefix="rdeploy-control-") as folder:
        place = Path(folder)
        np.save(place / "images.npy", np.concatenate(list(seen)))
        np.save(place / "decisions.npy", features(network.graph, seen).argmax(axis=1))
        words = [network.graph, place / "images.npy", place / "decisions.npy", place / "out.xml", max_drop / 100]
        more = ["--transformer"] if name.startswith("vit") else []
        script = Path(__file__).with_name("peer_nncf_control.py")
        done = subprocess.run([python, script, *map(str, words), *more], capture_output=True, text=True, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        compiled = openvino.Core().compile_model(str(place / "out.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for key, images in (("drop", seen), ("held_out", unseen)):
            made = np.concatenate([next(iter(compiled(image).values())) for image in images])
            made = made[:, 1:].mean(axis=1) if made.ndim == 3 else made
            truth = features(network.graph, images).argmax(axis=1)
            facts[key] = 100 * float(np.mean(made.argmax(axis=1) != truth))
    return facts


def row(name: str, tool: str, max_drop: float, found: dict[str, float]) -> str:
    return (
        f"| {name} | {tool} | {max_drop:g} | {found['fallbacks']:.0f} | {found['drop']:.2f} | {found['held_out']:.2f} | "
        f"{found['calls']:.0f} | {found['images']:.0f} | {found['seconds']:.0f} | {found['peak_bytes'] / 2**30:.2f} |"
    )


def nncf_python(work: Path) -> Path:
    """Return the Python of NNCF's environment, which is made where there is none."""
    python = work / "nncf" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", work / "nncf"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "nncf>=3.4", "openvino", "onnx"], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the labelled photographs (a folder with labels.csv)")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="downloads and graphs are kept here")
    parser.add_argument("--network", action="append", help=f"one of {', '.join(NETWORKS)}; repeatable")
    parser.add_argument("--max-drop", type=float, default=2.0, help="points")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--nncf", type=Path, help="the Python of an environment with NNCF")
    parser.add_argument("--only", choices=("rdeploy", "nncf"))
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    given = parser.parse_args()
    lines = [
        "# Accuracy control",
        "",
        __doc__.split("\n\n")[2].replace("\n", " "),
        "",
        networks.machine(),
        "",
        HEAD,
        "|---" * 10 + "|",
    ]
    print("\n".join(lines), flush=True)
    for name in given.network or NETWORKS:
        facts = (name, given.data, given.work, given.images, given.max_drop)
        networks.load(name, data=given.data, work=given.work)
        if given.only != "nncf":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                lines.append(row(name, "rdeploy", given.max_drop, process.submit(ours, *facts).result()))
            print(lines[-1], flush=True)
        if given.only != "rdeploy":
            found = nncf(*facts, given.nncf or nncf_python(given.work))
            lines.append(row(name, f"NNCF {found['version']}", given.max_drop, found))
            print(lines[-1], flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
