"""Accuracy control: how many layers fall back, at what cost, against NNCF's `quantize_with_accuracy_control`.

    python benchmarks/int8/accuracy_control.py --data photos/ [--network mobilenet_v2@224] [--max-drop 1] [--images 250]

Both calibrate on the same photographs and are judged on them, by the share that is decided otherwise than by FP32 (for the
ViT: by its largest mean patch feature). "Evaluations" counts graphs judged, "images run" every image of every evaluation; "held
out" is the same drop on photographs that nobody has seen. OpenVINO scheme; each tool runs in a process of its own, NNCF in its
own environment, and reads the images from a file one at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks
from rows import features

from rdeploy.quantize.ranges import float_outputs

NETWORKS = ("mobilenet_v2@224", "efficientnet_lite0@224", "vit_s14@224")
HEAD = (
    "| network | tool | points allowed | fallbacks | drop | held out | evaluations | images run | seconds | peak GB |"
)


def controlled(tool: str, name: str, given: argparse.Namespace, max_drop: float) -> dict[str, float]:
    """Run a tool's accuracy control in a process of its own and judge its result on images that it has not seen."""
    network = networks.load(name, data=given.data, work=given.work)
    seen, unseen = (
        networks.Batches(network.pixels, part, network.spec.preprocessing)
        for part in (network.order[: given.images], network.order[given.images :])
    )
    with tempfile.TemporaryDirectory(prefix="rdeploy-control-") as folder:
        place = Path(folder)
        np.save(place / "images.npy", np.concatenate(list(seen)))
        np.save(place / "decisions.npy", decisions(network.graph, seen))
        words = [network.graph.absolute(), place / "images.npy", place / "decisions.npy"]
        if tool == "rdeploy":
            script, python, out, more = "run_rdeploy_control.py", Path(sys.executable), place / "out.onnx", [max_drop]
        else:
            script, python, out = "peer_nncf_control.py", given.nncf or nncf_python(given.work), place / "out.xml"
            more = [max_drop / 100, *(["--transformer"] if name.startswith("vit") else [])]
        command = [python, Path(__file__).with_name(script), *words, out, *more]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{tool} on {name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        for key, images in (("drop", seen), ("held_out", unseen)):
            facts[key] = 100 * float(np.mean(decisions(out, images) != decisions(network.graph, images)))
    return facts


def decisions(graph: Path, images: networks.Batches) -> np.ndarray:
    """Return the class of each image, or the largest of a ViT's mean patch features; OpenVINO's own format is run by it."""
    if graph.suffix != ".xml":
        return np.array([features(outputs[0]).argmax() for outputs in float_outputs(graph, images)])
    import openvino

    compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array([features(next(iter(compiled(image).values()))).argmax() for image in images])


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
    parser.add_argument("--max-drop", action="append", help="points (default 1), or NETWORK=points; repeatable")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--nncf", type=Path, help="the Python of an environment with NNCF")
    parser.add_argument("--only", choices=("rdeploy", "NNCF"))
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
    budgets = dict(budget.rpartition("=")[::2] for budget in given.max_drop or ())
    for name in given.network or NETWORKS:
        max_drop = float(budgets.get(name, budgets.get("", 1.0)))
        for tool in ("rdeploy", "NNCF") if given.only is None else (given.only,):
            found = controlled(tool, name, given, max_drop)
            lines.append(row(name, f"{tool} {found['version']}", max_drop, found))
            print(lines[-1], flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
