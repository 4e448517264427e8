"""Does `rdeploy profile` measure what the runtimes' own tools measure?

    python benchmarks/agreement.py [--onnx FILE] [--rounds 12] [--out benchmarks/agreement.md]

The same engine file with the same settings: on OpenVINO by `benchmark_app` (latency hint, synchronous), on ONNX Runtime by
the loop of its own `onnxruntime.transformers.benchmark_helper.inference_ort`. By turns, in a random order every round, each
time in a fresh process that warms up by itself. A ratio is rdeploy's median over the tool's, of the medians of the rounds,
with a 95 % bootstrap interval over the rounds; the goal is within 3 %. The last column is the tool's own spread: the
interquartile range of its rounds over their median. Networks have random weights (no --data is needed for a latency).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from statistics import median

import numpy as np

from rdeploy import backends, environment, machine, measure, serde, targets, worker
from rdeploy.build_request import LoadOptions
from rdeploy.types import Timing
from rdeploy.worker.jobs import Entry, Measured, MeasureJob

NETWORKS = ("torchvision:mobilenet_v2", "torchvision:resnet18", "torchvision:resnet50")
TOOLS = {"openvino": "benchmark_app", "onnxruntime": "inference_ort"}
GOAL, WARM_RUNS = 0.03, 20


def exported(name: str, folder: Path) -> Path:
    """Export a network with random weights at its native resolution, batch 1."""
    from rdeploy import export, models

    loaded = models.load(name, LoadOptions(random_init=True))
    path = folder / f"{name.partition(':')[2]}.onnx"
    export.export(loaded.module, loaded.spec, loaded.spec.native_resolution, path, opset=18, dynamic_batch=False)
    return path


def by_rdeploy(backend: str, engine: Path, folder: Path, options: argparse.Namespace) -> float:
    """Return the median of one measure job: what `rdeploy profile` does."""
    seconds = options.seconds
    timing = Timing(max_samples=100_000, min_time_s=seconds, max_time_s=seconds)
    # benchmark_app takes no number of threads beside its hint: both leave it to OpenVINO.
    threads = options.threads if backend == "onnxruntime" else None
    job = MeasureJob(entries=(Entry(name="one", backend=backend, path=str(engine)),), timing=timing, threads=threads)
    answer = worker.call(serde.to_json(job), directory=folder / "measure", timeout_s=600)
    found = serde.from_json(Measured, answer["entries"][0], where="measure")
    if found.measurement is None:
        sys.exit(str(found.failure))
    return median(found.measurement.latencies_ms)


def by_benchmark_app(engine: Path, options: argparse.Namespace) -> float:
    """Return the median that OpenVINO's own tool prints."""
    run = "import sys; from openvino.tools.benchmark.main import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "-m", str(engine), "-d", "CPU", "-hint", "latency", "-api", "sync"]
    command += ["-t", str(max(1, round(options.seconds))), "-infer_precision", computed_in(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Median:\s+([\d.]+) ms", done.stdout)
    if found is None:
        sys.exit(f"benchmark_app printed no median:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found.group(1))


def computed_in(engine: Path) -> str:
    """Return what rdeploy has OpenVINO compute float layers in: the IR says it."""
    import openvino

    return str(openvino.Core().read_model(str(engine)).get_rt_info(["rdeploy", "inference_precision"]).value)


def by_inference_ort(engine: Path, options: argparse.Namespace) -> float:
    """Return the median of ONNX Runtime's own loop, in a process of its own."""
    command = [sys.executable, __file__, "--loop", str(engine), "--threads", str(options.threads)]
    command += ["--seconds", str(options.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return median(json.loads(done.stdout.splitlines()[-1])) * 1000.0


def loop(engine: Path, options: argparse.Namespace) -> None:
    """Print the seconds of every run of `inference_ort` on a session with rdeploy's settings."""
    # The helper imports transformers, which this loop does not use.
    sys.modules.setdefault("transformers", types.ModuleType("transformers"))
    from onnxruntime.transformers import benchmark_helper

    benchmark_helper.get_latency_result = lambda latencies, batch: {"latencies": list(latencies)}
    with backends.find("onnxruntime").open_session(engine, threads=options.threads) as session:
        rng = np.random.default_rng(0)
        inputs = {info.name: rng.standard_normal(info.shape, dtype=np.float32) for info in session.inputs}
        runtime = session._session  # the very session that rdeploy measures
        warm = benchmark_helper.inference_ort(runtime, inputs, {}, WARM_RUNS, 1)["latencies"]
        runs = max(16, round(options.seconds / median(warm)))
        print(json.dumps(benchmark_helper.inference_ort(runtime, inputs, {}, runs, 1)["latencies"]))


def row(name: str, graph: Path, backend: str, folder: Path, options: argparse.Namespace) -> str:
    """Measure one network on one runtime by both, by turns, and return the line of the table."""
    plugin = backends.find(backend)
    built = plugin.build_engine(graph, folder / backend, target=targets.load("cpu"), options=plugin.Options())
    engine = folder / backend / built.path
    theirs = by_benchmark_app if backend == "openvino" else by_inference_ort
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    order = random.Random(0)
    for _ in range(options.rounds):
        turn = ["ours", "theirs"]
        order.shuffle(turn)
        for who in turn:
            if who == "ours":
                found[who].append(by_rdeploy(backend, engine, folder, options))
            else:
                found[who].append(theirs(engine, options))
    ratio, (low, high), _ = measure.speedup([[x] for x in found["ours"]], [[x] for x in found["theirs"]], seed=0)
    lower, upper = np.percentile(found["theirs"], [25, 75])
    p50 = {who: median(values) for who, values in found.items()}
    verdict = "yes" if abs(ratio - 1) <= GOAL else "no"
    return (
        f"| {name} | {backend} | {TOOLS[backend]} | {p50['theirs']:.3f} | {p50['ours']:.3f} | "
        f"{ratio:.3f} [{low:.3f}, {high:.3f}] | {verdict} | {(upper - lower) / p50['theirs']:.1%} |"
    )


def head(options: argparse.Namespace) -> list[str]:
    facts = dict(environment.describe())
    versions = ", ".join(f"{name} {facts['runtimes'].get(name, '?')}" for name in ("openvino", "onnxruntime"))
    return [
        "# Agreement with the runtimes' own tools",
        "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "",
        f"{facts['cpu']}, {facts['threads']} cores, load {facts['load']}; {versions}; "
        f"ONNX Runtime with {options.threads} threads, {options.rounds} rounds of {options.seconds:g} s each.",
        "",
        "| network | runtime | its tool | its p50 ms | rdeploy p50 ms | rdeploy / tool [95 %] | within 3 % | tool's spread |",
        "|---|---|---|---|---|---|---|---|",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, action="append", help="a file in place of the networks; repeatable")
    parser.add_argument("--network", action="append", help=f"in place of {', '.join(NETWORKS)}; repeatable")
    parser.add_argument("--backend", action="append", choices=list(TOOLS), help="only this runtime; repeatable")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime; OpenVINO's hint decides for itself")
    parser.add_argument("--rounds", type=int, default=12, help="at least 6 for an interval")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each measures in a round")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        loop(options.loop, options)
        return
    lines = head(options)
    print("\n".join(lines), flush=True)
    before = machine.snapshot()
    with tempfile.TemporaryDirectory(prefix="rdeploy-agreement-") as temporary:
        folder = Path(temporary)
        graphs = [(path.stem, path) for path in options.onnx or ()]
        graphs += [(n.partition(":")[2], exported(n, folder)) for n in options.network or (() if graphs else NETWORKS)]
        for name, graph in graphs:
            for backend in options.backend or TOOLS:
                lines.append(row(name, graph, backend, folder / name, options))
                print(lines[-1], flush=True)
    for reason in machine.unfit(before, machine.snapshot(), own=os.getpid()):
        lines += ["", f"The machine was not fit to measure on: {reason}."]
        print(lines[-1])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
