"""The GPU check: everything that only a machine with an NVIDIA GPU can show, in one script; rows that were not run say so.

    make gpu-check                                                    on a host with packages
    python benchmarks/gpu_check.py --wheels FOLDER                    on one without: wheels, whole or packed by gpu_kit.py
    python benchmarks/gpu_check.py --only resnet50/224/1 --limit-s 500    within a time limit; a later call goes on

It runs the gpu-marked tests, then ResNet-50, EfficientNet-B0 and ViT-S/16 at 224 and 168, batch 1, 8 and 64, in FP32, FP16
and INT8, on PyTorch eager and compiled, ONNX Runtime CUDA, TensorRT (the installed one, and 8.6.0 from its wheel) and
TensorRT-RTX. Each row is a process of its own (`gpu_row.py`). It writes <device>.md and <device>.json under --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_kit
import gpu_networks

from rdeploy import environment, hardware

ROOT = Path(__file__).resolve().parent.parent
BATCHES, PRECISIONS = (1, 8, 64), ("fp32", "fp16", "int8")
RUNTIMES = ("torch", "torch_compile", "onnxruntime_cuda", "tensorrt", "tensorrt-8.6.0", "tensorrt_rtx")
TIMERS_AGREE = 0.02
LEAST_SQNR_DB = {"fp32": 40.0, "fp16": 25.0, "int8": 15.0}
"""How close a row's output must be to the CPU's of the same graph: TF32, FP16 rounding, and integers off by one."""
_ROW_TIMEOUT_S = 420.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the check."""

    network: str
    size: int
    batch: int
    precision: str
    runtime: str

    @property
    def key(self) -> str:
        return f"{self.network}/{self.size}/{self.batch}/{self.precision}/{self.runtime}"


def rows() -> list[Row]:
    """Return every row of the check, the small batches first."""
    return [
        Row(network, size, batch, precision, runtime)
        for batch in BATCHES
        for network in gpu_networks.NETWORKS
        for size in gpu_networks.SIZES
        for precision in PRECISIONS
        for runtime in RUNTIMES
    ]


def not_possible(row: Row, host: Host) -> str | None:
    """Return why a row cannot be run on this host, or None; nothing is started."""
    if host.gpu is None:
        return "no NVIDIA GPU here"
    if row.runtime.startswith("torch"):
        if row.precision == "int8":
            return "PyTorch has no INT8 of this kind on GPUs"
        return None if _installed("torch", "timm") else "torch or timm is not installed here"
    if row.runtime == "tensorrt-8.6.0":
        return None if host.kit else "no kit of TensorRT 8.6.0: --wheels FOLDER, packed by gpu_kit.py"
    from rdeploy import backends

    return backends.find(row.runtime).unavailable()


@dataclasses.dataclass(frozen=True)
class Host:
    """This machine: its GPU, the kit's Python, and where graphs and results go."""

    gpu: hardware.Gpu | None
    kit: Path | None
    work: Path
    paths: tuple[str, ...] = ()
    """Where the wheels that were brought are unpacked."""

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu.name if self.gpu else "no gpu").lower()).strip("-")


def measure(row: Row, host: Host) -> dict[str, Any]:
    """Run a row in its own process; return what it measured, or {"not_measured": why}."""
    try:
        job = {**dataclasses.asdict(row), **_graph(row, host)}
    except Exception as error:  # noqa: BLE001 - exporting a network can fail anywhere; the other rows go on
        return {"not_measured": f"its graph: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    python: list[str] = [sys.executable]
    if row.runtime == "tensorrt-8.6.0":
        python, job = [str(host.kit)], {**job, "runtime": "tensorrt", "stubs": True}
    paths = [str(ROOT), str(ROOT / "benchmarks"), *(() if python[0] == str(host.kit) else host.paths)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RDEPLOY_CACHE": str(host.work)}
    try:
        done = subprocess.run(
            [*python, str(ROOT / "benchmarks" / "gpu_row.py")], input=json.dumps(job), env=environ, text=True,
            capture_output=True, timeout=_ROW_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"not_measured": f"did not finish within {_ROW_TIMEOUT_S:g} s"}
    if done.returncode != 0:
        return {"not_measured": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:500]}
    return judged(row, json.loads(done.stdout.splitlines()[-1]))


def judged(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    """Add what is doubtful about a row: timers that disagree, outputs that are too far from the CPU's."""
    doubts = []
    if (independent := found.get("independent_ms")) is not None:
        found["timers_differ"] = abs(found["p50_ms"] / independent - 1.0)
        if found["timers_differ"] > TIMERS_AGREE:
            doubts.append(f"the independent timer says {independent:.3f} ms")
    if (sqnr_db := found.get("sqnr_db")) is not None and sqnr_db < LEAST_SQNR_DB[row.precision]:
        doubts.append(f"its outputs are {sqnr_db:.1f} dB from the CPU's, {LEAST_SQNR_DB[row.precision]:.0f} wanted")
    return {**found, "doubts": doubts}


def _graph(row: Row, host: Host) -> dict[str, Any]:
    """Return the row's graph, its real size and its reference; they are made once."""
    place = host.work / f"{row.network}-{row.size}.json"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(gpu_networks.graphs(row.network, row.size, host.work / "graphs")))
    made = json.loads(place.read_text())
    return {"size": made["size"], "onnx": made[row.precision], "reference": made[f"reference_{row.precision}"]}


def gpu_tests(host: Host) -> str:
    """Run the tests that are marked gpu; return pytest's last line, or why they were not run."""
    if host.gpu is None:
        return "not run: no NVIDIA GPU here"
    if not _installed("pytest"):
        return "not run: pytest is not installed here"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["no output"])[-1]


def report(results: dict[str, Any], host: Host) -> str:
    """Return the Markdown page of the device."""
    facts = results["environment"]
    lines = [
        f"# GPU check: {host.gpu.name if host.gpu else 'no GPU'}",
        "",
        f"Driver {facts.get('driver')}, {facts.get('os')}, Python {facts.get('python')}; {results['date']}. "
        "Written by `benchmarks/gpu_check.py`; latency is the median of 200 runs on random weights.",
        "",
        f"- tests marked gpu: {results['tests']}",
        f"- rows measured: {_count(results, 'p50_ms')} of {len(rows())}",
        "",
        "| network | size | batch | precision | runtime | p50 ms | other timer | MB ran | dB | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row, results["rows"].get(row.key, {"not_measured": "not reached"})) for row in rows()]
    return "\n".join(lines) + "\n"


def _line(row: Row, found: dict[str, Any]) -> str:
    size = found.get("size", row.size)
    cells = [row.network, str(size), str(row.batch), row.precision, row.runtime]
    if "p50_ms" not in found:
        return f"| {' | '.join(cells)} | | | | | not measured: {found['not_measured'].replace('|', '/')} |"
    timers = f"{100 * found['timers_differ']:.1f} %" if "timers_differ" in found else "none"
    memory = f"{found['memory']['ran'] / 1e6:.0f}" if "memory" in found else ""
    decibel = f"{found['sqnr_db']:.1f}" if found.get("sqnr_db") is not None else ""
    note = "; ".join([found.get("clock", ""), *found["doubts"]]).strip("; ")
    return f"| {' | '.join(cells)} | {found['p50_ms']:.3f} | {timers} | {memory} | {decibel} | {note} |"


def _count(results: dict[str, Any], key: str) -> int:
    return sum(key in found for found in results["rows"].values())


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def prepare(options: argparse.Namespace) -> Host:
    """Make wheels importable and join the kit, where they were brought."""
    kit: Path | None = None
    paths: list[str] = []
    if options.wheels is not None:
        paths = [str(unpacked(wheel, options.work / "wheels")) for wheel in sorted(options.wheels.glob("*.whl"))]
        sys.path[:0] = paths
        if (options.wheels / gpu_kit.SUMS).is_file():
            kit = gpu_kit.join(options.wheels)
    gpus = hardware.gpus()
    return Host(gpu=gpus[0] if gpus else None, kit=kit, work=options.work, paths=tuple(paths))


def unpacked(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel once, and return the folder that makes it importable."""
    import zipfile

    place = folder / wheel.stem
    if not place.is_dir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    return place


def main() -> None:
    options = _options()
    host = prepare(options)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{host.name}.json"
    results = json.loads(file.read_text()) if file.is_file() else {"rows": {}, "tests": "not run"}
    results["environment"] = dict(environment.describe())
    results["date"] = time.strftime("%Y-%m-%d")
    if not options.no_tests:
        results["tests"] = gpu_tests(host)
    for row in _wanted(options, results):
        reason = not_possible(row, host)
        results["rows"][row.key] = {"not_measured": reason} if reason else measure(row, host)
        print(_line(row, results["rows"][row.key]), flush=True)
        _write(file, results, host)
    _write(file, results, host)


def _wanted(options: argparse.Namespace, results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows that are asked for and not there yet, while there is time."""
    end = time.monotonic() + options.limit_s
    for row in rows():
        is_asked = not options.only or any(row.key.startswith(prefix) for prefix in options.only)
        if is_asked and "p50_ms" not in results["rows"].get(row.key, {}) and time.monotonic() < end:
            yield row


def _write(file: Path, results: dict[str, Any], host: Host) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, default=str) + "\n")
    partial.replace(file)
    file.with_suffix(".md").write_text(report(results, host))


def _options() -> argparse.Namespace:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, and of gpu_kit.py's parts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--work", type=Path, default=ROOT / ".rdeploy-cache" / "gpu-check", help="graphs and engines")
    parser.add_argument("--only", action="append", default=[], metavar="PREFIX", help="rows, such as resnet50/224/1")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no row after so many seconds")
    parser.add_argument("--no-tests", action="store_true", help="leave the gpu-marked tests out")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.wheels = options.wheels.resolve() if options.wheels else None
    return options


if __name__ == "__main__":
    main()
