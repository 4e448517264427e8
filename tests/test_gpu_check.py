"""The GPU check without a GPU: it is complete, says of every row why it was not measured, and fills none."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rdeploy import hardware

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_check as script

        yield script
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


def test_without_a_gpu_every_row_says_so_and_none_is_filled(gpu_check, tmp_path):
    if hardware.gpus():
        pytest.skip("there is a GPU here")

    printed = run(tmp_path)

    found = json.loads((tmp_path / "out" / "no-gpu.json").read_text())
    page = (tmp_path / "out" / "no-gpu.md").read_text()
    assert len(found["rows"]) == len(gpu_check.rows()) == 3 * 2 * 3 * 3 * 6
    assert {tuple(row) for row in map(dict.items, found["rows"].values())} == {
        (("not_measured", "no NVIDIA GPU here"),)
    }
    assert "- rows measured: 0 of 324" in page
    assert page.endswith("## Not measured\n\n- 324 rows, no NVIDIA GPU here\n")
    assert printed.splitlines() == [
        "324 rows not measured: no NVIDIA GPU here",
        f"0 of 324 rows measured so far: {tmp_path / 'out' / 'no-gpu.md'}",
    ]


def test_only_some_rows_and_a_time_limit(gpu_check, tmp_path):
    if hardware.gpus():
        pytest.skip("there is a GPU here")

    assert run(tmp_path, "--only", "vit_s16/168/8/int8").startswith(f"{len(gpu_check.RUNTIMES)} rows not measured")
    page = (tmp_path / "out" / "no-gpu.md").read_text()
    assert f"- {324 - len(gpu_check.RUNTIMES)} rows, not reached yet: run it again: resnet50/224/1/fp16" in page
    assert "- 6 rows, no NVIDIA GPU here: vit_s16/168/8/int8/tensorrt-8.6.0, vit_s16/168/8/int8/tensorrt," in page
    assert run(tmp_path, "--limit-s", "0").startswith("0 of 324 rows")


def test_what_tells_most_comes_first(gpu_check):

    order = gpu_check.rows()

    assert [row.key.removesuffix("/tensorrt-8.6.0") for row in order[:8]] == [
        f"{network}/{size}/1/{precision}"
        for network in ("resnet50", "vit_s16")
        for size in (224, 168)
        for precision in ("fp16", "int8")
    ]
    assert {row.runtime for row in order[8:12]} == {"tensorrt-8.6.0"}
    assert [row.batch for row in order] == sorted(row.batch for row in order)
    assert len(set(order)) == len(order)


ROW = ("resnet50", 224, 1, "fp32", "tensorrt")


@pytest.mark.parametrize(
    ("found", "doubts"),
    [
        ({"p50_ms": 1.0, "independent_ms": 1.01, "sqnr_db": 60.0}, []),
        ({"p50_ms": 1.0, "independent_ms": 1.1}, ["the independent timer says 1.100 ms"]),
        ({"p50_ms": 1.0, "independent_ms": 0.97}, ["the independent timer says 0.970 ms"]),
        ({"p50_ms": 1.0, "memory": {"opened": 900 << 20, "rdeploy_opened": 910 << 20, "ran": 1 << 30}}, []),
        (
            {"p50_ms": 1.0, "memory": {"ran": 1000 * 10**6, "rdeploy_ran": 1100 * 10**6}},
            ["rdeploy says 1100 MB ran, cudaMemGetInfo 1000 MB"],
        ),
        ({"p50_ms": 1.0, "sqnr_db": 12.0}, ["its outputs are 12.0 dB from the CPU's, 40 wanted"]),
    ],
)
def test_a_row_says_what_is_doubtful_about_it(gpu_check, found, doubts):

    assert gpu_check.judged(gpu_check.Row(*ROW), dict(found))["doubts"] == doubts


def test_a_measured_row_and_one_that_failed_are_not_run_again(gpu_check):
    options = argparse.Namespace(only=["resnet50/224/1/fp32"], again=False)
    tried = [gpu_check.Row(*ROW[:4], runtime).key for runtime in ("tensorrt", "torch", "tensorrt_rtx")]
    results = {
        "rows": dict(zip(tried, [{"p50_ms": 1.0}, {"not_measured": "x", "failed": True}, {"not_measured": "y"}]))
    }

    found = [row.runtime for row in gpu_check.wanted(options, results, float("inf"))]
    again = [row.runtime for row in gpu_check.wanted(argparse.Namespace(only=options.only, again=True), results, 1e18)]

    assert set(found) == set(gpu_check.RUNTIMES) - {"tensorrt", "torch"}
    assert set(again) == set(gpu_check.RUNTIMES) - {"tensorrt"}
    assert list(gpu_check.wanted(options, results, 0.0)) == []


def test_the_tests_see_the_wheels_that_were_brought_and_have_a_time_limit(gpu_check, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH"\n')
    python.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(python))
    here = gpu_check.Host(gpu=object(), kit=None, work=tmp_path, paths=("/brought/wheel",))

    assert gpu_check.gpu_tests(here) == f"{ROOT}:{BENCHMARKS}:/brought/wheel"
    python.write_text("#!/bin/sh\nexec sleep 5\n")
    monkeypatch.setattr(gpu_check, "_TESTS_TIMEOUT_S", 0.1)
    assert gpu_check.gpu_tests(here) == "stopped: not done within 0 s"
    assert gpu_check.gpu_tests(gpu_check.Host(gpu=None, kit=None, work=tmp_path)) == "not run: no NVIDIA GPU here"


GRAPHS = {"size": 176, "int8": "i.onnx", "reference_int8": "i.npy", "fp16": "h.onnx", "reference_fp16": "f.npy"}


@pytest.fixture
def host(gpu_check, monkeypatch, tmp_path):
    """A host whose kit is a shell script; returns the host and what to write into the script."""
    monkeypatch.setattr(gpu_check, "_graph", lambda row, host, limit_s: {"onnx": "m.onnx"})
    made = gpu_check.Host(gpu=None, kit=tmp_path / "trt-python", work=tmp_path)

    def kit(script):
        made.kit.write_text(f"#!/bin/sh\n{script}\n")
        made.kit.chmod(0o755)
        return made

    return kit


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo some log >&2; echo TensorRT says no >&2; exit 3", "TensorRT says no"),
        ("exit 3", "ended with code 3 and no word"),
        ("kill -SEGV $$", "ended with code -11 and no word"),
        ("true", "its process ended without a result"),
        ("echo no json", "its process ended without a result"),
    ],
)
def test_a_row_that_fails_says_why_and_fails_alone(gpu_check, host, script, reason):
    row = gpu_check.Row("resnet50", 224, 1, "fp32", "tensorrt-8.6.0")

    assert gpu_check.measure(row, host(script)) == {"not_measured": reason, "failed": True}


def test_a_kit_that_does_not_start(gpu_check, host, tmp_path):
    made = host("true")
    made.kit.unlink()

    found = gpu_check.measure(gpu_check.Row("resnet50", 224, 1, "fp32", "tensorrt-8.6.0"), made)

    assert found["not_measured"] == f"{made.kit} does not start: No such file or directory"


def test_a_row_that_is_late_is_tried_again_where_it_had_less_than_its_time(gpu_check, host, monkeypatch):
    row, made = gpu_check.Row("resnet50", 224, 1, "fp32", "tensorrt-8.6.0"), host("exec sleep 5")

    assert gpu_check.measure(row, made, left_s=0.1) is None
    monkeypatch.setattr(gpu_check, "_ROW_TIMEOUT_S", 0.2)
    assert gpu_check.measure(row, made, left_s=60.0) == {"not_measured": "did not finish within 0 s", "failed": True}


def test_a_network_that_cannot_be_exported_takes_its_rows_along_and_no_other(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho RuntimeError: no such network >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    made = gpu_check.Host(gpu=None, kit=tmp_path / "trt-python", work=tmp_path / "work")

    found = gpu_check.measure(gpu_check.Row("resnet50", 224, 1, "fp32", "tensorrt-8.6.0"), made)

    assert found == {"not_measured": "its graph: RuntimeError: no such network", "failed": True}


def test_a_network_is_exported_once(gpu_check, monkeypatch, tmp_path):
    made = gpu_check.Host(gpu=None, kit=None, work=tmp_path / "work")
    folder = tmp_path / "work" / "graphs"
    touch = f"cd {folder} && touch i.onnx i.npy h.onnx f.npy"
    folder.mkdir(parents=True)
    (tmp_path / "python").write_text(f"#!/bin/sh\ncat >> {tmp_path}/jobs\n{touch}\necho '{json.dumps(GRAPHS)}'\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(tmp_path / "python"))

    first, second = (
        gpu_check._graph(gpu_check.Row("vit_s16", 168, 1, precision, "tensorrt"), made, 60.0)
        for precision in ("int8", "fp16")
    )

    assert first == {"size": 176, "onnx": str(folder / "i.onnx"), "reference": str(folder / "i.npy")}
    assert second == {"size": 176, "onnx": str(folder / "h.onnx"), "reference": str(folder / "f.npy")}
    job = {"network": "vit_s16", "size": 168, "folder": str(folder)}
    assert json.loads((tmp_path / "jobs").read_text()) == job


def bring_graphs(folder):
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs" / "vit_s16-168.json").write_text(json.dumps(GRAPHS))
    for name in ("i.onnx", "i.npy"):
        (folder / "graphs" / name).write_bytes(name.encode() * 100)
    return folder


def test_graphs_that_were_brought_are_taken_and_nothing_is_exported(gpu_check, monkeypatch, tmp_path):
    folder = bring_graphs(tmp_path / "brought")
    made = gpu_check.Host(gpu=None, kit=None, work=tmp_path / "work", brought=folder)
    monkeypatch.setattr(gpu_check.sys, "executable", "/no/python")
    row = gpu_check.Row("vit_s16", 168, 1, "int8", "tensorrt")

    whole = gpu_check._graph(row, made, 60.0)
    gpu_check.gpu_parts.cut(folder, part_mb=0.0002)
    joined = gpu_check._graph(row, made, 60.0)

    assert whole["onnx"] == str(folder / "graphs" / "i.onnx")
    assert not (folder / "graphs" / "i.onnx").exists()
    assert Path(joined["onnx"]).read_bytes() == b"i.onnx" * 100
    (folder / "graphs" / "i.npy.001").unlink()
    (tmp_path / "work" / "joined" / "graphs" / "i.npy").unlink()
    with pytest.raises(gpu_check.RowFailed, match=r"its graph: .*i.npy.001 is missing or damaged: bring it again"):
        gpu_check._graph(row, made, 60.0)


def test_the_graphs_are_prepared_once_and_a_network_that_cannot_be_exported_is_told(gpu_check, monkeypatch, tmp_path):
    exported = []
    monkeypatch.setattr(gpu_check, "_child", lambda words, told, host, limit_s: exported.append(json.loads(told)) or {})
    made = gpu_check.Host(gpu=None, kit=None, work=tmp_path / "work")

    gpu_check.prepare(tmp_path / "folder", made)
    gpu_check.prepare(tmp_path / "folder", made)

    assert [(job["network"], job["size"]) for job in exported] == [
        (network, size) for network in ("resnet50", "efficientnet", "vit_s16") for size in (224, 168)
    ]
    assert {job["folder"] for job in exported} == {str(tmp_path / "folder" / "graphs")}

    def fail(*words):
        raise gpu_check.RowFailed("No module named 'timm'")

    monkeypatch.setattr(gpu_check, "_child", fail)
    with pytest.raises(SystemExit, match="resnet50 at 224 cannot be exported: No module named 'timm'"):
        gpu_check.prepare(tmp_path / "other", made)


@pytest.mark.slow
def test_exported_graphs_lie_in_their_folder_and_may_move(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="exports a network")
    pytest.importorskip("timm", reason="exports a network of timm's")
    pytest.importorskip("onnxruntime", reason="executes the references")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_networks

    monkeypatch.setitem(gpu_networks.NETWORKS, "efficientnet", "test_efficientnet")

    found = gpu_networks.graphs("efficientnet", 224, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")

    assert found.pop("size") == 224
    assert set(found) == {f"{kind}{one}" for kind in ("", "reference_") for one in ("fp32", "fp16", "int8")}
    assert all((tmp_path / "there" / path).is_file() for path in found.values())


def test_what_a_row_measured_is_taken_from_its_last_line(gpu_check, host, monkeypatch, tmp_path):
    made = host(
        'cat > job.json\necho chatter\necho \'{"p50_ms": 2.0, "independent_ms": 2.01, "back_to_back_ms": 1.5}\''
    )
    monkeypatch.chdir(tmp_path)
    row = gpu_check.Row("resnet50", 224, 1, "int8", "tensorrt-8.6.0")

    found = gpu_check.measure(row, made)

    job = json.loads((tmp_path / "job.json").read_text())
    assert (job["runtime"], job["stubs"], job["onnx"], job["batch"]) == ("tensorrt", True, "m.onnx", 1)
    assert (found["p50_ms"], found["timers_differ"], found["doubts"]) == (2.0, pytest.approx(0.005), [])
    assert "| 2.000 | +0.5 % | 1.500 |" in gpu_check.gpu_page.line(row, found)


def test_the_page_shows_what_was_measured_and_groups_the_rest(gpu_check):
    fast = gpu_check.Row("resnet50", 224, 1, "fp16", "tensorrt-8.6.0")
    slow = gpu_check.Row("resnet50", 224, 1, "fp16", "torch")
    broken = gpu_check.Row("vit_s16", 168, 1, "int8", "tensorrt-8.6.0")
    found = {
        fast.key: {"p50_ms": 0.5, "size": 224, "doubts": []},
        slow.key: {"p50_ms": 4.0, "size": 224, "do_bench_ms": 3.5, "doubts": ["too slow"]},
        broken.key: {"not_measured": "a | b", "failed": True},
    }
    results = {"rows": found, "tests": "12 passed", "date": "today", "environment": {"driver": "580", "os": "Linux"}}

    page = gpu_check.gpu_page.page(results, "H100", [fast, slow, broken])

    assert "- tests marked gpu: 12 passed\n- rows measured: 2 of 3\n" in page
    assert "| network | size | batch | tensorrt-8.6.0 fp16 | torch fp16 |" in page
    assert "| resnet50 | 224 | 1 | 0.500 | 4.000* |" in page
    assert "| resnet50 | 224 | 1 | fp16 | torch | 4.000 | none |  |  |  | do_bench 3.500 ms; too slow |" in page
    assert page.endswith("## Not measured\n\n- 1 rows, a | b\n")
