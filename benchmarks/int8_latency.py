"""Latency of rdeploy's INT8 graphs against the peers', in the same runtime, interleaved in one run.

    python benchmarks/int8_latency.py --data photos/ [--out benchmarks/results/int8_latency.md]

On OpenVINO the peer is NNCF's own model (in its own virtual environment, made by the script under --work), on ONNX Runtime
it is `quantize_static` (QDQ, U8S8, per channel). Same FP32 graph, same 128 calibration images, batch 1, 2 threads. A ratio
is the median latency of ours over the peer's, each pooled over three processes; the goal is at most 1.0 within its 95 %
interval. The last column is the peer against itself in a second process: what the machine's noise alone makes of 1.0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import networks
import numpy as np

from rdeploy import backends, hardware, measure, serde, targets, worker
from rdeploy.quantize import recipe
from rdeploy.types import QuantOptions, Timing
from rdeploy.worker.jobs import Entry, Measured, MeasureJob, Pixels

PROCESSES = 3
NETWORKS = ("efficientnet_lite0@224", "mobilenet_v2@224", "resnet50@224", "vit_s14@224")


def ours(network: networks.Network, backend: str, folder: Path) -> Path:
    """Quantize for one runtime and build its engine; return the engine's file."""
    target = targets.load("cpu")
    plugin = backends.find(backend)
    graph = folder / f"{backend}-int8.onnx"
    scheme = plugin.scheme(target)
    images = network.calibration
    calibration = recipe.calibrate(network.graph, folder, schemes=[scheme], images=images)
    recipe.quantize(calibration, graph, scheme=scheme, images=images, options=QuantOptions())
    return engine(graph, backend, folder / f"{backend}-int8")


def engine(graph: Path, backend: str, folder: Path) -> Path:
    """Build a graph for one runtime."""
    folder.mkdir(parents=True, exist_ok=True)
    plugin = backends.find(backend)
    return folder / plugin.build_engine(graph, folder, target=targets.load("cpu"), options=plugin.Options()).path


def quantize_static(network: networks.Network, folder: Path) -> Path:
    """ONNX Runtime's own static quantization as its documentation has it for x86: QDQ, U8S8, per channel, min-max.

    Without VNNI it recommends weights of 7 bits (`reduce_range`), which ours have there as well.
    """
    import onnx_ir as ir
    from onnxruntime import quantization as ort

    name = ir.load(network.graph).graph.inputs[0].name

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(network.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {name: image}

    prepared, out = folder / "prepared.onnx", folder / "static.onnx"
    ort.quant_pre_process(str(network.graph), str(prepared), skip_symbolic_shape=True)
    ort.quantize_static(
        str(prepared), str(out), Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
        activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
        reduce_range=not hardware.multiplies_int8_without_saturating(),
    )  # fmt: skip
    return out


def nncf(network: networks.Network, folder: Path, python: Path) -> Path:
    """NNCF's default post-training quantization, in its own environment."""
    np.save(folder / "calibration.npy", np.concatenate(list(network.calibration)))
    script = Path(__file__).with_name("peer_nncf.py")
    out = folder / "nncf.xml"
    more = ["--transformer"] if network.name.startswith("vit") else []
    words = [python, script, network.graph, folder / "calibration.npy", out, *more]
    subprocess.run(words, check=True, capture_output=True)
    return at_its_best(out)


def at_its_best(path: Path) -> Path:
    """Have a peer's float layers computed in what is faster for them, as rdeploy does with its own."""
    import openvino

    from rdeploy.backends import openvino as plugin

    model, out = openvino.Core().read_model(str(path)), path.with_name("at-its-best.xml")
    model.set_rt_info(plugin._inference_precision(path, 1, plugin.Options()), plugin._MARK)
    openvino.save_model(model, str(out), compress_to_fp16=False)
    return out


def nncf_python(work: Path) -> Path:
    """Return the Python of NNCF's environment, made on the first call: its pins are its own affair."""
    python = work / "nncf" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", work / "nncf"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "nncf>=3.4", "openvino", "onnx"], check=True)
    return python


def measured(
    entries: list[tuple[str, str, Path]], network: networks.Network, folder: Path, rounds: int
) -> dict[str, Measured]:
    """Measure (name, backend, file) interleaved, each in a process of its own."""
    np.save(folder / "pixels.npy", network.pixels[:32])
    pixels = Pixels(pixels=str(folder / "pixels.npy"), preprocessing=network.spec.preprocessing)
    job = MeasureJob(
        entries=tuple(Entry(name=name, backend=backend, path=str(path)) for name, backend, path in entries),
        timing=Timing(min_samples=rounds, max_samples=4 * rounds, min_time_s=2.5, max_time_s=10.0, max_warmup_s=1.5),
        threads=2,
        input=pixels,
    )
    answer = worker.call(serde.to_json(job), directory=folder / "measure", timeout_s=900)
    found = [serde.from_json(Measured, entry, where="measure") for entry in answer["entries"]]
    return {entry.name: entry for entry in found}


def pooled(name: str, found: dict[str, Measured]) -> list[tuple[float, ...]]:
    """Join the blocks of one engine's processes round by round: a process has its own luck with memory and cores."""
    runs = [entry.blocks for key, entry in found.items() if key.startswith(f"{name} ")]
    return [sum(blocks, ()) for blocks in zip(*runs, strict=False)]


def rows(network: networks.Network, work: Path, samples: int) -> list[str]:
    lines = []
    with tempfile.TemporaryDirectory(prefix="rdeploy-latency-") as temporary:
        folder = Path(temporary)
        peers = {
            "openvino": ("NNCF", nncf(network, folder, nncf_python(work))),
            "onnxruntime": (
                "quantize_static",
                engine(quantize_static(network, folder), "onnxruntime", folder / "static"),
            ),
        }
        for backend, (peer, path) in peers.items():
            mine = ours(network, backend, folder)
            files = {"fp32": engine(network.graph, backend, folder / f"{backend}-fp32"), "ours": mine, "peer": path}
            entries = [
                (f"{name} {index}", backend, file)
                for index in range(PROCESSES)
                for name, file in files.items()
                if name != "fp32" or index == 0
            ]
            found = measured(entries, network, folder, samples)
            if failed := [entry for entry in found.values() if entry.failure]:
                sys.exit(str(failed[0].failure))
            blocks = {name: pooled(name, found) for name in files}
            ratio, (low, high), _ = measure.speedup(blocks["peer"], blocks["ours"], seed=networks.SEED)
            floor, (below, above), _ = measure.speedup(
                found["peer 0"].blocks, found["peer 1"].blocks, seed=networks.SEED
            )
            p50 = {name: float(np.median(sum(rows, ()))) for name, rows in blocks.items()}
            # speedup is peer / ours; the table shows ours / peer
            line = (
                f"| {network.name} | {backend} | {p50['fp32']:.2f} | {peer} | {p50['peer']:.2f} | {p50['ours']:.2f} | "
            )
            verdict = "yes" if 1 / high <= 1.0 else "no"
            line += f"{1 / ratio:.3f} [{1 / high:.3f}, {1 / low:.3f}] | {verdict} | "
            line += f"{1 / floor:.3f} [{1 / above:.3f}, {1 / below:.3f}] |"
            print(line, flush=True)
            lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the labelled photographs (a folder with labels.csv)")
    parser.add_argument(
        "--work", type=Path, default=Path("out/benchmarks"), help="downloads and environments are kept here"
    )
    parser.add_argument("--network", action="append", help=f"one of {', '.join(NETWORKS)}; repeatable")
    parser.add_argument("--samples", type=int, default=200, help="at least so many runs of each process")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    lines = ["# INT8 latency against the peers", "", __doc__.split("\n\n")[2].replace("\n", " "), "", networks.machine(), "",
             "| network | runtime | FP32 ms | peer | peer ms | rdeploy ms | rdeploy / peer [95 %] | at most 1.0 | "
             "peer / itself |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    for name in arguments.network or NETWORKS:
        network = networks.load(name, data=arguments.data, work=arguments.work)
        lines += rows(network, arguments.work.absolute(), arguments.samples)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
