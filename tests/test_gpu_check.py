"""The GPU check without a GPU: it is complete, says of every row why it was not measured, and fills none."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_check
        import gpu_kit

        yield gpu_check, gpu_kit
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(tmp_path, *words):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", tmp_path / "out", "--work", tmp_path / "work"]
    done = subprocess.run(
        [*map(str, command), "--no-tests", *words], env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_gpu_every_row_says_so_and_none_is_filled(scripts, tmp_path):
    gpu_check, _ = scripts
    if gpu_check.hardware.gpus():
        pytest.skip("there is a GPU here")

    printed = run(tmp_path)

    found = json.loads((tmp_path / "out" / "no-gpu.json").read_text())
    page = (tmp_path / "out" / "no-gpu.md").read_text()
    assert len(found["rows"]) == len(gpu_check.rows()) == 3 * 2 * 3 * 3 * 6
    assert {tuple(row) for row in map(dict.items, found["rows"].values())} == {
        (("not_measured", "no NVIDIA GPU here"),)
    }
    assert page.count("not measured: no NVIDIA GPU here") == len(gpu_check.rows()) == printed.count("not measured")
    assert "- rows measured: 0 of 324" in page


def test_only_some_rows_and_a_time_limit(scripts, tmp_path):
    gpu_check, _ = scripts

    assert len(run(tmp_path, "--only", "vit_s16/168/8/int8").splitlines()) == len(gpu_check.RUNTIMES)
    assert run(tmp_path, "--limit-s", "0") == ""
    assert "not measured: not reached" in next((tmp_path / "out").glob("*.md")).read_text()


ROW = ("resnet50", 224, 1, "fp32", "tensorrt")


@pytest.mark.parametrize(
    ("found", "doubts"),
    [
        ({"p50_ms": 1.0, "independent_ms": 1.01, "sqnr_db": 60.0}, []),
        ({"p50_ms": 1.0, "independent_ms": 1.1}, ["the independent timer says 1.100 ms"]),
        ({"p50_ms": 1.0, "sqnr_db": 12.0}, ["its outputs are 12.0 dB from the CPU's, 40 wanted"]),
    ],
)
def test_a_row_says_what_is_doubtful_about_it(scripts, found, doubts):
    gpu_check, _ = scripts

    assert gpu_check.judged(gpu_check.Row(*ROW), dict(found))["doubts"] == doubts


def test_a_measured_row_is_not_measured_again(scripts):
    import argparse

    gpu_check, _ = scripts
    options = argparse.Namespace(only=["resnet50/224/1/fp32"], limit_s=float("inf"))
    results = {"rows": {gpu_check.Row(*ROW).key: {"p50_ms": 1.0}}}

    assert [row.runtime for row in gpu_check._wanted(options, results)] == [
        runtime for runtime in gpu_check.RUNTIMES if runtime != "tensorrt"
    ]


def test_a_row_whose_process_fails_says_the_last_line_of_it(scripts, monkeypatch, tmp_path):
    gpu_check, _ = scripts
    host = gpu_check.Host(gpu=None, kit=tmp_path / "trt-python", work=tmp_path)
    host.kit.write_text("#!/bin/sh\necho some log >&2\necho TensorRT says no >&2\nexit 3\n")
    host.kit.chmod(0o755)
    monkeypatch.setattr(gpu_check, "_graph", lambda row, host: {})
    row = gpu_check.Row("resnet50", 224, 1, "fp32", "tensorrt-8.6.0")

    assert gpu_check.measure(row, host) == {"not_measured": "TensorRT says no"}


def test_what_a_row_measured_is_taken_from_its_last_line(scripts, monkeypatch, tmp_path):
    gpu_check, _ = scripts
    host = gpu_check.Host(gpu=None, kit=tmp_path / "trt-python", work=tmp_path)
    host.kit.write_text('#!/bin/sh\ncat > job.json\necho chatter\necho \'{"p50_ms": 2.0, "independent_ms": 2.0}\'\n')
    host.kit.chmod(0o755)
    monkeypatch.setattr(gpu_check, "_graph", lambda row, host: {"onnx": "m.onnx"})
    monkeypatch.chdir(tmp_path)
    row = gpu_check.Row("resnet50", 224, 1, "int8", "tensorrt-8.6.0")

    found = gpu_check.measure(row, host)

    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["runtime"], job["stubs"], job["onnx"], job["batch"]) == ("tensorrt", True, "m.onnx", 1)
    assert (found["p50_ms"], found["timers_differ"], found["doubts"]) == (2.0, 0.0, [])
    assert "| 2.000 | 0.0 % |" in gpu_check._line(row, found)


def test_a_kit_is_cut_into_parts_and_joined_again(scripts, tmp_path):
    _, gpu_kit = scripts
    folder = tmp_path / "made"
    (folder / "site" / "pkg").mkdir(parents=True)
    content = random.Random(0).randbytes(20_000)
    (folder / "site" / "pkg" / "data.bin").write_bytes(content)

    parts = gpu_kit.pack_folder(folder, tmp_path / "parts", part_mb=0.001)
    assert len(parts) > 1
    assert all(part.stat().st_size <= 1049 for part in parts)
    runner = gpu_kit.join(tmp_path / "parts")

    assert (tmp_path / "parts" / "kit" / "site" / "pkg" / "data.bin").read_bytes() == content
    assert runner.name == "trt-python"
    assert gpu_kit.join(tmp_path / "parts") == runner


def test_a_damaged_part_is_refused(scripts, tmp_path):
    _, gpu_kit = scripts
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_bytes(b"a" * 1000)
    parts = gpu_kit.pack_folder(tmp_path / "made", tmp_path / "parts", part_mb=1)
    parts[0].write_bytes(parts[0].read_bytes()[:-1])

    with pytest.raises(SystemExit, match=r"kit.tar.xz.000 is missing or damaged: bring it again"):
        gpu_kit.join(tmp_path / "parts")


def test_a_wheel_becomes_importable(scripts, tmp_path):
    import zipfile

    gpu_check, _ = scripts
    with zipfile.ZipFile(tmp_path / "some_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_package_of_a_wheel.py", "value = 7\n")

    place = gpu_check.unpacked(tmp_path / "some_package-1.0-py3-none-any.whl", tmp_path / "wheels")

    spec = importlib.util.spec_from_file_location("wheel", place / "some_package_of_a_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.value == 7
