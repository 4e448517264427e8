"""Where a build's time goes: runs a real `rdeploy build` with an empty cache, again with a full one, and prints the stages.

    python benchmarks/build_breakdown.py [--data photos/] [--model M] [--out RESULT.md]

Unavoidable: importing torch and loading the model, export, forward passes (calibrate, quantize's scoring, build's
verification), measuring. Everything else is overhead; the goal is at most 20 % of the wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNAVOIDABLE = ("load", "export", "calibrate", "quantize", "build", "measure")
MODEL = "examples.efficientnet_lite:efficientnet_lite0"


def build(arguments: argparse.Namespace, data: Path, folder: Path) -> tuple[float, dict[str, float]]:
    """Run the build once and return its wall time with start-up, and the stages that it reports."""
    command = [
        sys.executable, "-m", "rdeploy", "build", arguments.model, "--scale", "0.75", "--int8", "--calib", str(data),
        "--target", arguments.target, "--out", str(folder / "out"), "--json",
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "RDEPLOY_CACHE": str(folder / "cache")}, capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return wall, json.loads(done.stdout)["timings_s"]


def render(arguments: argparse.Namespace, runs: list[tuple[str, float, dict[str, float]]]) -> str:
    """Return the table as Markdown, with the machine that it was measured on."""
    from rdeploy import environment

    facts = dict(environment.describe())
    lines = [
        f"# Where a build's time goes: {arguments.model}",
        "",
        f"`--scale 0.75 --int8 --target {arguments.target}`, seed 0. Machine: {facts.get('cpu')}, "
        f"{os.cpu_count()} cores, {facts.get('os')}, Python {facts.get('python')}; "
        + ", ".join(f"{name} {version}" for name, version in dict(facts.get("runtimes", {})).items()),
        "",
        "| stage | " + " | ".join(f"{name}, s" for name, _, _ in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    stages = dict.fromkeys(stage for _, _, stages in runs for stage in stages if stage not in ("total", "other"))
    for stage in stages:
        lines.append(f"| {stage} | " + " | ".join(f"{found.get(stage, 0):.1f}" for _, _, found in runs) + " |")
    waits = [sum(found.get(stage, 0) for stage in UNAVOIDABLE) for _, _, found in runs]
    walls = [wall for _, wall, _ in runs]
    lines += [
        "| wall time of the command | " + " | ".join(f"{wall:.1f}" for wall in walls) + " |",
        "| not one of the unavoidable stages | "
        + " | ".join(f"{wall - wait:.1f} ({(wall - wait) / wall:.0%})" for wall, wait in zip(walls, waits))
        + " |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="calibration images; the demonstration's own when not given")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--target", default="rtx-40")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rdeploy-breakdown-") as temporary:
        folder = Path(temporary)
        data = arguments.data
        if data is None:
            from examples import images

            images.gather(folder / "images")
            data = folder / "images" / "calib"
        runs = [(name, *build(arguments, data, folder)) for name in ("empty cache", "again")]
    table = render(arguments, runs)
    print(table)
    if arguments.out:
        arguments.out.write_text(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
