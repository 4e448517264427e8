"""A build for a device whose TensorRT is not here: the bundle has the graph, its pre-flight and its script; no engine."""

import json
import textwrap

import pytest

from rdeploy import bundle
from rdeploy.backends import tensorrt

from .conftest import FACTORY, Workplace

TARGET = """\
backends: [tensorrt, onnxruntime]
tensorrt: "10.3"
compute_capabilities: [sm_87]
opset: 17
precisions: [fp32, fp16, int8]
timing: {min_samples: 16, max_samples: 32, min_time_s: 0.01, max_time_s: 0.1, max_warmup_s: 0.1}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("torch", reason="building needs PyTorch")
    pytest.importorskip("onnxruntime", reason="building needs ONNX Runtime")
    if tensorrt.unavailable() is None:
        pytest.skip("TensorRT builds here")
    folder = tmp_path_factory.mktemp("device")
    (folder / "digits_model.py").write_text(textwrap.dedent(FACTORY))
    (folder / "orin.yaml").write_text(TARGET)
    workplace = Workplace(folder)
    done = workplace.run(
        "build", "digits_model:digits_net", "--scale", "0.75", "--fp16", "--int8", "--calib", "random",
        "--calib-samples", "4", "--target", "orin.yaml", "--out", "out",
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # random weights may fail verification
    return workplace, done


def test_every_variant_has_the_graph_that_the_device_builds(built):
    workplace, done = built
    for precision in ("fp16", "int8"):
        (folder,) = (workplace.folder / "out").glob(f"*-{precision}")
        manifest = bundle.read(folder)
        graphs = {graph["backend"]: graph for graph in manifest["graphs"]}
        assert graphs["tensorrt"]["path"] == "model.onnx"
        assert bundle.verified_graph(folder, manifest, "tensorrt") == folder / "model.onnx"
        assert [info["name"] for info in graphs["tensorrt"]["inputs"]] == ["input"]
        assert "tensorrt" not in {engine["backend"] for engine in manifest["engines"]}
        assert "--stronglyTyped" in (folder / "build-engine.sh").read_text()
        notes = " ".join(manifest["notes"])
        assert "tensorrt 10.3, on the device: nothing is in the way" in notes
        assert "tensorrt's graph, executed on this CPU, is" in notes
    assert "its graph is in the bundle, to be built on the device" in done.stdout + done.stderr


def test_doctor_says_where_the_bundle_can_be_built(built):
    workplace, _ = built
    (folder,) = (workplace.folder / "out").glob("*-int8")

    done = workplace.run("doctor", str(folder), "--target", "jetson-agx-orin-jp6", "--json")

    assert json.loads(done.stdout) == [{"title": "TensorRT 10.3", "target": "jetson-agx-orin-jp6", "obstacles": []}]
