"""The GPU check: everything that only a machine with an NVIDIA GPU can show, in one script; rows that were not run say so.

    make gpu-check                                                    on a host with packages
    python benchmarks/gpu_check.py --prepare FOLDER                   elsewhere, before: the graphs, for a host without PyTorch
    python benchmarks/gpu_check.py --wheels FOLDER                    on one without packages: what was brought, see gpu_kit.py
    python benchmarks/gpu_check.py --limit-s 540                      within a time limit; the same call again goes on

It runs the gpu-marked tests, then ResNet-50, EfficientNet-B0 and ViT-S/16 at 224 and 168, batch 1, 8 and 64, in FP32, FP16
and INT8, on PyTorch eager and compiled, ONNX Runtime CUDA, TensorRT (the installed one, and 8.6.0 from its wheel) and
TensorRT-RTX: what tells most comes first. Each row and each network's export is a process of its own (`gpu_row.py`,
`gpu_networks.py`) under a time limit, so that a failure is that row's alone. It writes <device>.md and <device>.json
under --out after every row; what is measured there is not measured again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_host
import gpu_networks
import gpu_page
import gpu_parts
from gpu_host import ROOT, Host, environ
from gpu_page import Row

from rdeploy import environment

BATCHES, PRECISIONS = (1, 8, 64), ("fp16", "int8", "fp32")
RUNTIMES = ("tensorrt-8.6.0", "tensorrt", "torch", "onnxruntime_cuda", "tensorrt_rtx", "torch_compile")
TIMERS_AGREE = 0.02
MEMORY_AGREES, MEMORY_GRAIN = 0.02, 32 << 20
"""How far rdeploy's account of GPU memory may be from cudaMemGetInfo's: a share, and what allocators round to."""
LEAST_SQNR_DB = {"fp32": 40.0, "fp16": 25.0, "int8": 15.0}
"""How close a row's output must be to the CPU's of the same graph: TF32, FP16 rounding, and integers off by one."""
_ROW_TIMEOUT_S, _TESTS_TIMEOUT_S, _LEAST_S = 420.0, 300.0, 60.0
"""The longest that a row and the tests may take; with less than the last left of --limit-s, no row is started."""
_EXPORT_TIMEOUT_S = 3600.0


def rows() -> list[Row]:
    """Return every row of the check, in the order in which they are run: what tells most comes first.

    First the two networks that the README speaks of in FP16 and INT8 on the whole TensorRT, then what they are compared
    with; then EfficientNet; then the larger batches.
    """
    cells = itertools.product(BATCHES, gpu_networks.NETWORKS, gpu_networks.SIZES, RUNTIMES, PRECISIONS)
    found = [Row(network, size, batch, precision, runtime) for batch, network, size, runtime, precision in cells]
    return sorted(found, key=lambda row: (row.batch, row.network == "efficientnet", _tier(row)))


def _tier(row: Row) -> int:
    """Return how early a row of one network and batch comes: 0 is first."""
    if row.runtime.startswith("tensorrt-"):
        return 0 if row.precision != "fp32" else 1
    return 1 + RUNTIMES.index(row.runtime)


def not_possible(row: Row, host: Host) -> str | None:
    """Return why a row cannot be run on this host, or None; nothing is started."""
    if host.gpu is None:
        return "no NVIDIA GPU here"
    if row.runtime.startswith("torch"):
        if row.precision == "int8":
            return "PyTorch has no INT8 of this kind on GPUs"
        return None if _installed("torch", "timm") else "torch or timm is not installed here"
    if row.runtime == "tensorrt-8.6.0":
        return None if host.kit else host.no_kit
    from rdeploy import backends

    return backends.find(row.runtime).unavailable()


def measure(row: Row, host: Host, *, left_s: float = float("inf")) -> dict[str, Any] | None:
    """Run a row in its own process; return what it measured, {"not_measured": why}, or None: it needs more time than is left."""
    started = time.monotonic()
    try:
        job = {**dataclasses.asdict(row), **_graph(row, host, min(left_s, _ROW_TIMEOUT_S))}
    except RowFailed as failed:
        return failed.said(left_s)
    python: list[str] = [sys.executable]
    if row.runtime == "tensorrt-8.6.0":
        python, job = [str(host.kit)], {**job, "runtime": "tensorrt", "stubs": True}
    left_s -= time.monotonic() - started
    try:
        said = _child([*python, "gpu_row.py"], json.dumps(job), host, min(left_s, _ROW_TIMEOUT_S))
    except RowFailed as failed:
        return failed.said(left_s)
    return judged(row, said)


class RowFailed(Exception):
    """A row's process did not say what it should; `is_late` when it was stopped by its time limit."""

    def __init__(self, reason: str, *, is_late: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late

    def said(self, left_s: float) -> dict[str, Any] | None:
        """Return why the row was not measured; None where it had less than a row's time and may be tried again."""
        return None if self.is_late and left_s < _ROW_TIMEOUT_S else {"not_measured": str(self), "failed": True}


def _child(words: list[str], told: str, host: Host, limit_s: float) -> dict[str, Any]:
    """Run a script of this folder with `told` on its stdin; return the JSON of its last line.

    Raises:
        RowFailed: it ended with an error, was killed, took too long, or said nothing.
    """
    *python, script = words
    wheels = () if python == [str(host.kit)] else host.paths
    try:
        done = subprocess.run(
            [*python, str(ROOT / "benchmarks" / script)], input=told, env=environ(host, wheels), text=True,
            capture_output=True, timeout=max(1.0, limit_s), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RowFailed(f"did not finish within {limit_s:.0f} s", is_late=True) from error
    except OSError as error:
        raise RowFailed(f"{python[0]} does not start: {error.strerror}") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RowFailed((said or [f"ended with code {done.returncode} and no word"])[-1][:500])
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise RowFailed("its process ended without a result") from error
    return dict(found)


def judged(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    """Add what is doubtful about a row: timers that disagree, outputs that are too far from the CPU's."""
    doubts = []
    if (independent := found.get("independent_ms")) is not None:
        found["timers_differ"] = independent / found["p50_ms"] - 1.0
        if abs(found["timers_differ"]) > TIMERS_AGREE:
            doubts.append(f"the independent timer says {independent:.3f} ms")
    memory = found.get("memory", {})
    for name in ("opened", "ran"):
        theirs, ours = memory.get(name), memory.get(f"rdeploy_{name}")
        if theirs is None or ours is None:
            continue
        if abs(ours - theirs) > max(MEMORY_GRAIN, MEMORY_AGREES * theirs):
            doubts.append(f"rdeploy says {ours / 1e6:.0f} MB {name}, cudaMemGetInfo {theirs / 1e6:.0f} MB")
    if (sqnr_db := found.get("sqnr_db")) is not None and sqnr_db < LEAST_SQNR_DB[row.precision]:
        doubts.append(f"its outputs are {sqnr_db:.1f} dB from the CPU's, {LEAST_SQNR_DB[row.precision]:.0f} wanted")
    return {**found, "doubts": doubts}


def _graph(row: Row, host: Host, limit_s: float) -> dict[str, Any]:
    """Return the row's graph, its real size and its reference: those that were brought, else they are made once.

    Raises:
        RowFailed: the network cannot be exported here, or what was brought is damaged.
    """
    index = f"graphs/{row.network}-{row.size}.json"
    folder = host.brought if host.brought is not None and (host.brought / index).is_file() else host.work
    try:
        if not (folder / index).is_file():
            export(row.network, row.size, folder / "graphs", host, limit_s)
        made = json.loads((folder / index).read_text())
        names = {"onnx": f"graphs/{made[row.precision]}", "reference": f"graphs/{made[f'reference_{row.precision}']}"}
        files = {key: str(gpu_parts.whole(folder, name, host.work / "joined")) for key, name in names.items()}
    except RowFailed as failed:
        raise RowFailed(f"its graph: {failed}", is_late=failed.is_late) from failed
    except gpu_parts.Damaged as error:
        raise RowFailed(f"its graph: {error}") from error
    return {"size": made["size"], **files}


def export(network: str, size: int, folder: Path, host: Host, limit_s: float) -> None:
    """Write a network's graphs and references into a folder, in a process of its own, and the index of them when all are there.

    Raises:
        RowFailed: it cannot be exported here.
    """
    job = {"network": network, "size": size, "folder": str(folder)}
    made = _child([sys.executable, "gpu_networks.py"], json.dumps(job), host, limit_s)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{network}-{size}.json").write_text(json.dumps(made))


def prepare(folder: Path, host: Host) -> None:
    """Export every network at every size into `folder`/graphs, each once; end with the reason where one cannot be."""
    for network, size in itertools.product(gpu_networks.NETWORKS, gpu_networks.SIZES):
        if not (folder / "graphs" / f"{network}-{size}.json").is_file():
            try:
                export(network, size, folder / "graphs", host, _EXPORT_TIMEOUT_S)
            except RowFailed as failed:
                sys.exit(f"{network} at {size} cannot be exported: {failed}")
        print(f"{network} at {size}: {folder / 'graphs'}", flush=True)


def gpu_tests(host: Host) -> str:
    """Run the tests that are marked gpu; return pytest's last line, or why they were not run."""
    if host.gpu is None:
        return "not run: no NVIDIA GPU here"
    if not _installed("pytest"):
        return "not run: pytest is not installed here"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    how: dict[str, Any] = {"cwd": ROOT, "env": environ(host, host.paths), "timeout": _TESTS_TIMEOUT_S}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    except subprocess.TimeoutExpired:
        return f"stopped: not done within {_TESTS_TIMEOUT_S:.0f} s"
    return (done.stdout.strip().splitlines() or ["no output"])[-1]


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def main() -> None:
    options = _options()
    end = time.monotonic() + options.limit_s
    if options.prepare is not None:
        prepare(options.prepare.resolve(), Host(gpu=None, kit=None, work=options.work))
        return
    host = gpu_host.find(options.work, brought=options.wheels, fetch_kit=options.fetch_kit)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{host.name}.json"
    results = json.loads(file.read_text()) if file.is_file() else {"rows": {}, "tests": "not run"}
    results["environment"] = dict(environment.describe())
    results["date"] = time.strftime("%Y-%m-%d")
    if not options.no_tests and results["tests"].startswith("not run"):
        results["tests"] = gpu_tests(host)
        print(f"tests marked gpu: {results['tests']}", flush=True)
    impossible: collections.Counter[str] = collections.Counter()
    for row in wanted(options, results, end):
        if reason := not_possible(row, host):
            results["rows"][row.key] = {"not_measured": reason}
            impossible[reason] += 1
            continue
        found = measure(row, host, left_s=end - time.monotonic())
        if found is None:
            break
        results["rows"][row.key] = found
        print(gpu_page.line(row, found), flush=True)
        _write(file, results, host)
    _write(file, results, host)
    for reason, number in impossible.items():
        print(f"{number} rows not measured: {reason}")
    print(f"{gpu_page.count(results)} of {len(rows())} rows measured so far: {file.with_suffix('.md')}", flush=True)


def wanted(options: argparse.Namespace, results: dict[str, Any], end: float) -> Iterator[Row]:
    """Yield the rows that are asked for and were neither measured nor tried, while there is time."""
    for row in rows():
        is_asked = not options.only or any(row.key.startswith(prefix) for prefix in options.only)
        known = results["rows"].get(row.key, {})
        is_done = "p50_ms" in known or (known.get("failed") and not options.again)
        if is_asked and not is_done and end - time.monotonic() > _LEAST_S:
            yield row


def _write(file: Path, results: dict[str, Any], host: Host) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, default=str) + "\n")
    partial.replace(file)
    file.with_suffix(".md").write_text(gpu_page.page(results, host.gpu.name if host.gpu else "no GPU", rows()))


def _options() -> argparse.Namespace:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--wheels", type=Path, help="a folder that was brought: wheels, graphs, a kit, whole or in parts"
    )
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="export the graphs into a folder to bring; no rows"
    )
    parser.add_argument("--fetch-kit", action="store_true", help="install TensorRT 8.6.0 with pip, for a Python 3.10")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--work", type=Path, default=ROOT / ".rdeploy-cache" / "gpu-check", help="graphs and engines")
    parser.add_argument("--only", action="append", default=[], metavar="PREFIX", help="rows, such as resnet50/224/1")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="end within so many seconds")
    parser.add_argument("--again", action="store_true", help="also the rows that failed in an earlier call")
    parser.add_argument("--no-tests", action="store_true", help="leave the gpu-marked tests out")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.wheels = options.wheels.resolve() if options.wheels else None
    return options


if __name__ == "__main__":
    main()
