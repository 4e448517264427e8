"""The benchmarks start, say what they measure and take the images as an option; their numbers are not the tests' affair."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / "benchmarks", ROOT / "benchmarks" / "int8")
SCRIPTS = sorted(path for folder in FOLDERS for path in folder.glob("*.py") if "ArgumentParser" in path.read_text())
ON_IMAGES = [path for path in SCRIPTS if not path.stem.startswith("gpu_")]
"""The GPU check measures speed on random weights and has tests of its own (test_gpu_check.py)."""


def test_there_are_benchmarks():
    assert {"build_breakdown", "calibration", "int8_latency", "int8_quality"} <= {path.stem for path in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("script", ON_IMAGES, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_measures_and_takes_the_images(script, tmp_path):
    pytest.importorskip("torch", reason="the benchmarks export networks")

    answer = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert answer.returncode == 0, answer.stderr
    assert "--data" in answer.stdout
    assert "--out" in answer.stdout
    assert len(answer.stdout.split("\n\n")[1]) > 40


def test_every_benchmark_is_in_the_overview():
    overview = (ROOT / "benchmarks" / "README.md").read_text()

    names = [str(path.relative_to(ROOT / "benchmarks")) for path in SCRIPTS]
    assert [name for name in names if f"`{name} " not in overview and f"`{name}`" not in overview] == []
