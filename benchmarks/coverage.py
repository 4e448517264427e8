"""Which architectures come through: each at 0.75 of its resolution, FP32 and INT8, on two CPU runtimes and TensorRT-RTX.

Every architecture of `architectures.py`, with random weights, runs in a child process with limits on time and memory
and leaves a line of JSON; a run that was stopped goes on where it was. `done` means that the size fell, that all six engines
were built and that they agree with the variant in FP32 (TensorRT-RTX's graph executed by ONNX Runtime), whose answers
differ from image to image: where random weights say nothing, the network is woken first. What is not done has its reason,
and the failures of PyTorch's exporter are told apart from rdeploy's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import architectures

BACKENDS = ("onnxruntime", "openvino", "tensorrt_rtx")
TARGET = """\
description: two CPU runtimes, and TensorRT-RTX ahead of time
backends: [onnxruntime, openvino, tensorrt_rtx]
compute_capabilities: [sm_89]
"""
PRECISIONS = ("fp32", "int8")
SHORT = {"onnxruntime": "ORT", "openvino": "OV", "tensorrt_rtx": "RTX"}


def main() -> None:
    """Run what has not been run yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", default="random", help="images to calibrate and compare on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("coverage.md"))
    parser.add_argument("--lines", type=Path, help="the JSON lines; default: beside --out")
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="these architectures, run again")
    parser.add_argument("--again", nargs="*", default=[], metavar="STATUS", help="run those of this status again")
    parser.add_argument("--limit-s", type=float, default=900.0)
    parser.add_argument("--limit-gb", type=float, default=8.0)
    parser.add_argument("--one", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(examine(options.one, options.data)))
        return
    lines = options.lines or options.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    found = read(lines)
    wanted = [m for m in architectures.ARCHITECTURES if m not in found or found[m]["status"] in options.again]
    wanted = options.only or wanted
    for index, model in enumerate(wanted, 1):
        found[model] = run(model, data=options.data, limit_s=options.limit_s, limit_gb=options.limit_gb)
        with lines.open("a") as file:
            file.write(json.dumps(found[model]) + "\n")
        print(f"{index}/{len(wanted)} {model}: {found[model]['status']} {found[model]['reason']}", flush=True)
        options.out.write_text(table(found))
    options.out.write_text(table(found))


def read(lines: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each architecture."""
    text = lines.read_text() if lines.is_file() else ""
    return {line["model"]: line for line in map(json.loads, text.splitlines())}


def run(model: str, *, data: str, limit_s: float, limit_gb: float) -> dict[str, Any]:
    """Examine one architecture in a child process that is ended at its limits."""
    started, peak = time.monotonic(), 0
    command = [sys.executable, str(Path(__file__).resolve()), "--one", model, "--data", data]
    with tempfile.TemporaryDirectory(prefix="rdeploy-coverage-") as cache, tempfile.TemporaryFile("w+") as out:
        environment = {**os.environ, "RDEPLOY_CACHE": cache}
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        ended = ""
        while child.poll() is None and not ended:
            peak = max(peak, _memory_bytes(child.pid))
            if time.monotonic() - started > limit_s:
                ended = f"took more than {limit_s:g} s"
            elif peak > limit_gb * 1e9:
                ended = f"took more than {limit_gb:g} GB"
            time.sleep(0.2)
        if ended:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        out.seek(0)
        last = (out.read().strip().splitlines() or [""])[-1]
    try:
        answer = dict(json.loads(last))
    except ValueError:
        answer = {
            "model": model,
            "status": "failed",
            "reason": ended or f"the process ended: {last[:200]}",
            "engines": {},
        }
    return {**answer, "seconds": round(time.monotonic() - started, 1), "peak_mb": round(peak / 1e6)}


def _memory_bytes(pid: int) -> int:
    try:
        parent = psutil.Process(pid)
        return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))
    except psutil.Error:
        return 0


def examine(model: str, data: str) -> dict[str, Any]:
    """Take one architecture down rdeploy's own line, without measuring, and return what came of it."""
    from rdeploy import intake
    from rdeploy.errors import ConfigError, RdeployError, StageError, Unsupported
    from rdeploy.request import build_request

    found: dict[str, Any] = {"model": model, "status": "done", "reason": "", "engines": {}}
    with tempfile.TemporaryDirectory(prefix="rdeploy-coverage-") as folder:
        target = Path(folder) / "coverage.yaml"
        target.write_text(TARGET)
        asked: dict[str, Any] = {
            "scale": 0.75, "fp32": True, "int8": True, "calib": data, "calib_samples": 16, "calibrator": "minmax",
            "target": str(target), "random_init": True, "offline": True, "out": folder,
            "arch_kwargs": architectures.arguments(model),
        }  # fmt: skip
        try:
            this, _ = intake.take_in(build_request(model, asked), lambda message: print(message, file=sys.stderr))
            found["native"], found["task"] = list(this.spec.native_resolution), this.spec.task
            found["woken"] = wake(this.model.module, this.spec)
            _take_down_the_line(this, found)
        except (Unsupported, ConfigError) as error:
            found |= {"status": "refused", "reason": str(error)}
        except StageError as error:
            exporter = "PyTorch's exporter stopped" in str(error)
            found |= {"status": "exporter" if exporter else "failed", "reason": str(error)}
        except RdeployError as error:
            found |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever else there is, is what this benchmark looks for
            found |= {"status": "failed", "reason": f"crash: {type(error).__name__}: {error}"}
    return found


def wake(module: Any, spec: Any) -> bool:
    """Let an untrained network answer by what it sees, if it does not: comparing constants would prove nothing.

    Last layers that are zero get random weights, BatchNorm the statistics of a few pictures. Returns whether that was done.

    Raises:
        StageError: its answers are the same for all pictures even so.
    """
    import torch

    from rdeploy.errors import StageError

    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(8, spec.channels, 7, 7, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=spec.native_resolution, mode="bilinear")
    if _tells_apart(module, pictures):
        return False
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d) and not part.weight.any():
                part.weight.normal_(std=0.02, generator=generator)
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = None
                part.train()
        module(pictures)
    module.eval()
    if not _tells_apart(module, pictures):
        raise StageError(
            "wake", "with random weights its answers hardly depend on the image: nothing could be compared"
        )
    return True


def _tells_apart(module: Any, pictures: Any) -> bool:
    """Whether the answers differ by more than a hundredth of their size, and are no rounding errors."""
    import torch

    with torch.no_grad():
        answers = module(pictures)
    answers = answers if isinstance(answers, torch.Tensor) else answers[0]
    spread, size = (answers.amax(0) - answers.amin(0)).mean(), answers.abs().mean()
    return bool(size > 1e-6 and spread > 0.01 * size)


def _take_down_the_line(this: Any, found: dict[str, Any]) -> None:
    from rdeploy import pipeline

    for variant in pipeline.variants(this):
        settled, _ = pipeline.settled_variant(this, variant)
        found["resolution"] = list(settled.resolution)
        if settled.resolution == this.spec.native_resolution:
            raise AssertionError("it was to be built at a lower resolution, and is not")
        row = pipeline.run_variant(this, settled, reference=None)
        for backend, result in row.results.items():
            told = _engine(result)
            found["engines"][f"{variant.precision}/{backend}"] = told
            if told["status"] != "done" and found["status"] == "done":
                reason = f"{variant.precision} on {backend}: {told['reason']}"
                found |= {"status": told["status"], "reason": reason}


def _engine(result: Any) -> dict[str, Any]:
    """Return how one engine fared: a refusal says why before anything is built, a failure comes after."""
    if result.failure is not None:
        status = "refused" if result.failure.stage == "preflight" or result.failure.error == "Unsupported" else "failed"
        return {"status": status, "reason": result.failure.message}
    verification = result.verification
    if verification is None:
        return {"status": "failed", "reason": "was not verified"}
    parity = verification.parity
    told = {
        "sqnr_db": None if parity is None else round(parity.sqnr_db, 1),
        "cosine": None if parity is None else parity.cosine,
    }
    return {"status": "done" if verification.passed else "failed", "reason": "; ".join(verification.reasons), **told}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the page: the counts, the architectures that are not done with their reasons, then all of them."""
    ordered = [found[m] for m in architectures.ARCHITECTURES if m in found]
    ordered += [line for model, line in found.items() if model not in architectures.ARCHITECTURES]
    counts = Counter(line["status"] for line in ordered)
    total = max(1, len(ordered))
    names = {"done": "done", "refused": "refused in plain words", "exporter": "PyTorch's exporter", "failed": "failed"}
    said = ", ".join(f"{label} {counts[key]}" for key, label in names.items() if counts[key])
    heads = [f"{precision.upper()} {SHORT[backend]}" for precision in PRECISIONS for backend in BACKENDS]
    share = 100 * counts["done"] / total
    parts = [
        "# Coverage",
        f"{len(ordered)} architectures with random weights, each at 0.75 of its native side length, by "
        f"`benchmarks/coverage.py`: {said} ({share:.0f} % done).",
        "Every cell is the signal-to-noise ratio of the engine's outputs against the same variant in FP32, in dB (200: "
        "identical; TensorRT-RTX's graph is executed by ONNX Runtime). Random weights prove that a graph is built and "
        "computes what it should; how accurate INT8 is on trained networks is in "
        "[results/int8_quality.md](results/int8_quality.md).",
    ]
    if others := [line for line in ordered if line["status"] != "done"]:
        rows = [f"| {line['model']} | {names[line['status']]} | {_cell(line['reason'])} |" for line in others]
        parts.append("\n".join(["## Not done", "", "| architecture | what | reason |", "|---|---|---|", *rows]))
    head = f"| architecture | px | {' | '.join(heads)} | s | peak MB |"
    rows = [_row(line) for line in ordered]
    parts.append("\n".join(["## All", "", head, "|---" * (len(heads) + 4) + "|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(line: dict[str, Any]) -> str:
    size = "x".join(str(side) for side in dict.fromkeys(line.get("resolution", [])))
    cells = [_cell_of(line["engines"].get(f"{p}/{b}")) for p in PRECISIONS for b in BACKENDS]
    return f"| {line['model']} | {size} | {' | '.join(cells)} | {line['seconds']:.0f} | {line['peak_mb']} |"


def _cell_of(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return "–"
    return (
        f"{engine['sqnr_db']:g}" if engine["status"] == "done" and engine["sqnr_db"] is not None else engine["status"]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]


if __name__ == "__main__":
    main()
