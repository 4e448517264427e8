import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the tiny networks are written with onnx: pip install 'rdeploy[torch]'")

from rdeploy import cli, hardware, preflight, targets  # noqa: E402
from rdeploy.backends import openvino, tensorrt, tensorrt_rtx  # noqa: E402
from rdeploy.errors import MissingDependency, StageError  # noqa: E402
from rdeploy.types import Target  # noqa: E402

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_onnx.py"))


@pytest.fixture
def onnx(tmp_path):
    return TINY["write"](tmp_path / "m.onnx")


@pytest.fixture
def unsigned(tmp_path):
    return TINY["write"](tmp_path / "u.onnx", scheme=openvino.scheme(Target(name="t")))


@pytest.fixture
def absent(monkeypatch):
    def no_version():
        raise MissingDependency("not here")

    monkeypatch.setattr(tensorrt, "version", no_version)


def test_the_version_is_the_installed_one_then_the_targets_then_the_newest(monkeypatch, absent):
    assert preflight.version("tensorrt", targets.load("jetson-xavier-jp5")) == "8.5"
    assert preflight.version("tensorrt", targets.load("a100")) == "11.4"
    monkeypatch.setattr(tensorrt, "version", lambda: "10.16.2")
    assert preflight.version("tensorrt", targets.load("jetson-xavier-jp5")) == "10.16.2"


def test_the_runtimes_of_cpus_take_any_graph(unsigned):
    assert preflight.obstacles(unsigned, "onnxruntime", Target(name="t")) == ()


def test_all_that_is_in_the_way_is_found_before_a_build(absent, unsigned):
    told = preflight.obstacles(unsigned, "tensorrt", targets.load("jetson-xavier-jp5"))

    assert [sentence.partition(",")[0] for sentence in told] == [
        "the graph is opset 18",
        "TensorRT 8.5 takes symmetric INT8 only",
    ]


@pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason="TensorRT-RTX is not installed")
def test_a_gpu_that_rtx_does_not_know(onnx):
    told = preflight.obstacles(onnx, "tensorrt_rtx", Target(name="t", compute_capabilities=("sm_90",)))

    assert told == ("TensorRT-RTX 1.7 does not build for sm_90, only for sm_75, sm_80, sm_86, sm_89, sm_120, sm_121",)


def test_the_memory_of_the_gpu_that_is_here_counts_where_it_is_of_the_targets_kind(onnx, monkeypatch):
    small = Target(name="t", memory_mb=100, compute_capabilities=("sm_89",))

    def memory(*gpus):
        monkeypatch.setattr(hardware, "gpus", lambda: gpus)
        return preflight._with_memory(small).memory_mb

    assert memory() == 100
    assert memory(hardware.Gpu("RTX 4090", "sm_89", 24 << 30)) == 24 << 10
    assert memory(hardware.Gpu("H200", "sm_90", 140 << 30)) == 100


def test_a_refused_build_says_all_of_it_and_a_device_without_onnx_asks_the_builder(absent, unsigned, monkeypatch):
    target = targets.load("jetson-xavier-jp5")
    with pytest.raises(StageError, match=r"the graph is opset 18.*; TensorRT 8.5 takes symmetric INT8 only"):
        preflight.check(unsigned, "tensorrt", target)

    monkeypatch.setitem(sys.modules, "rdeploy.graph.needs", None)
    monkeypatch.delattr("rdeploy.graph.needs", raising=False)
    preflight.check(unsigned, "tensorrt", target)


def test_doctor_says_for_a_model_which_releases_build_it(onnx, capsys):
    assert cli.execute(["doctor", str(onnx)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].split("  ")[0] == "FAIL"
    assert "TensorRT 8.5" in lines[0]
    assert "opset 18, TensorRT 8.5 reads up to 17" in lines[0]
    assert all(line.startswith("PASS") for line in lines[2:])


def test_doctor_fails_for_a_target_that_cannot_take_the_model(onnx, capsys):
    assert (
        cli.execute(["doctor", str(onnx), "--target", "jetson-xavier-jp5", "--target", "jetson-agx-orin-jp6", "--json"])
        == 2
    )

    found = json.loads(capsys.readouterr().out)
    assert [(one["target"], one["title"], len(one["obstacles"])) for one in found] == [
        ("jetson-xavier-jp5", "TensorRT 8.5", 1),
        ("jetson-agx-orin-jp6", "TensorRT 10.3", 0),
    ]


def test_only_what_a_version_lacks_and_can_be_written_otherwise_is(absent, tmp_path, onnx):
    import onnx as library

    helper = library.helper
    node = helper.make_node("LayerNormalization", ["x", "s"], ["y"], name="n")
    value = [helper.make_tensor_value_info(name, 1, [1, 4]) for name in "xy"]
    scale = library.numpy_helper.from_array(np.ones(4, np.float32), "s")
    graph = helper.make_graph([node], "g", value[:1], value[1:], [scale])
    path = tmp_path / "norm.onnx"
    library.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)

    assert preflight.to_be_lowered(path, "tensorrt", targets.load("jetson-xavier-jp5")) == ("LayerNormalization",)
    assert preflight.to_be_lowered(path, "tensorrt", targets.load("jetson-agx-orin-jp6")) == ()
    assert preflight.to_be_lowered(path, "openvino", targets.load("cpu")) == ()
    assert preflight.to_be_lowered(onnx, "tensorrt", targets.load("jetson-xavier-jp5")) == ()


def test_a_bundles_own_graph_for_a_runtime_is_asked(absent, onnx, unsigned):
    (verdict,) = preflight.verdicts(unsigned, ["jetson-agx-orin-jp6"])
    (own,) = preflight.verdicts(unsigned, ["jetson-agx-orin-jp6"], {"tensorrt": onnx})

    assert (len(verdict.obstacles), own.obstacles) == (1, ())


def test_doctor_reads_the_graph_of_a_bundle_and_says_when_there_is_nothing_to_ask(written, tiny_bundle, capsys):
    assert cli.execute(["doctor", str(tiny_bundle), "--target", "cpu"]) == 0
    assert "no TensorRT among the backends of cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--target", "cpu"], 2, "--target needs a model"),
        (["nothing.onnx"], 2, "nothing.onnx: neither a bundle nor an ONNX file"),
    ],
)
def test_a_wrong_request_is_one_line(words, code, message, capsys):
    assert cli.execute(["doctor", *words]) == code

    assert message in capsys.readouterr().err
