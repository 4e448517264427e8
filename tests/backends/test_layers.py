"""Times by layer in one table: every runtime's own profiler, the model's names, and a remainder that makes them sum."""

import importlib.util

import numpy as np
import pytest

from rdeploy import backends
from rdeploy.backends import _layers, _trt_layers, _trt_session
from rdeploy.measured import LayerTime, LayerTimes
from rdeploy.types import Target


@pytest.fixture
def built(tiny, tmp_path):
    """Return `built(name, quantized) -> (backend, engine file)` of the tiny network."""

    def make(name, quantized):
        backend = backends.find(name)
        if reason := backend.unavailable():
            pytest.skip(reason)
        scheme = backend.scheme(Target(name="x")) if quantized else None
        tiny["write"](tmp_path / "tiny.onnx", scheme=scheme)
        engine = backend.build_engine(
            tmp_path / "tiny.onnx", tmp_path / "engine", target=Target(name="x"), options=backend.Options()
        )
        return backend, tmp_path / "engine" / engine.path

    return make


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_kernels_and_remainder_sum_to_the_whole(built, tiny, name, quantized):
    backend, path = built(name, quantized)

    found = backend.layer_times(path, {"x": tiny["image"]()}, threads=1, runs=5)

    assert found.runs == 5
    assert sum(kernel.mean_ms for kernel in found.kernels) + found.remainder_ms == pytest.approx(found.whole_ms)
    assert found.remainder_ms > 0
    covered = {layer for kernel in found.kernels for layer in kernel.layers}
    assert {"conv_node", "branch_node"} <= covered  # OpenVINO's counters leave out what took less than a microsecond
    convolutions = [one for one in found.kernels if "Conv" in one.kind]
    precisions = {one.precision for one in convolutions}
    # Which of the two was faster for so small a network is OpenVINO's and the machine's affair.
    assert precisions == {"int8"} if quantized else precisions in ({"fp32"}, {"bf16"})
    assert all(one.mean_ms > 0 for one in convolutions)


def test_the_reference_has_no_profiler():
    assert not hasattr(backends.find("reference"), "layer_times")


def test_tensorrts_profiler_and_the_copies(fake, fake_cuda, tmp_path):
    path = tmp_path / "tensorrt.engine"
    path.write_bytes(b"plan")
    flavour, _ = fake("10.3")
    session = _trt_session.Session(path, flavour=lambda: flavour, runtime=lambda: fake_cuda, use_graphs=False)

    found = _trt_layers.layer_times(session, {"x": np.zeros((1, 3), np.float32)}, runs=4)

    assert found.profiler == "TensorRT's profiler"
    assert [(one.name, one.kind, one.mean_ms, one.layers) for one in found.kernels] == [
        ("Reformatting CopyNode for Input Tensor 0 to conv", "reformat", 0.25, ()),
        ("conv + PWN(relu)", "", 0.25, ("conv", "relu")),
        ("(upload)", "copy", 0.25, ()),
        ("(download)", "copy", 0.25, ()),
    ]
    assert found.remainder_ms == pytest.approx(found.whole_ms - 1.0)
    assert fake_cuda.launches == 0


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("/conv1/Conv + /relu/Relu", ("/conv1/Conv", "/relu/Relu")),
        ("PWN(PWN(/a/Sigmoid), /a/Mul)", ("/a/Sigmoid), /a/Mul",)),
        ("{ForeignNode[/norm1/Mean.../mlp/Add]}", ("/norm1/Mean", "/mlp/Add")),
        ("(Unnamed Layer* 3) [Shuffle]", ()),
        ("a || b", ("a", "b")),
    ],
)
def test_names_of_tensorrts_layers(name, layers):
    assert _trt_layers.covered(name) == layers


NAMES = _layers.Names(
    by_name={n: _layers.Node(name=n) for n in ("conv", "relu", "add", "q")},
    by_output={
        "conv_out": _layers.Node(name="conv", op_type="Conv", inputs=("x",), outputs=("conv_out",)),
        "relu_out": _layers.Node(name="relu", op_type="Relu", inputs=("conv_out",), outputs=("relu_out",)),
    },
)


@pytest.mark.parametrize(
    ("kernel", "op_type", "layers"),
    [
        ("conv", "Conv", ("conv",)),
        ("fused conv", "FusedConv", ("conv",)),
        ("conv_token_12", "QLinearConv", ("conv",)),
        ("conv/WithoutBiases", "", ("conv",)),
        ("q/duplicated", "DequantizeLinear", ("q",)),
        ("relu_out_nchwc", "Conv", ("conv", "relu")),
        ("conv_out_nchwc", "Conv", ("conv",)),
        ("relu_out", "Gelu", ("relu",)),
        ("ReorderOutput", "ReorderOutput", ()),
    ],
)
def test_a_kernels_name_leads_to_the_models_layers(kernel, op_type, layers):
    assert NAMES.covered(kernel, op_type) == layers


def test_a_kernel_named_after_a_tensor_gets_the_layer_that_writes_it():
    kernels = [
        LayerTime(name=n, kind="", mean_ms=1.0, layers=layers)
        for n, layers in {"a": ("relu_out",), "b": ("conv", "relu"), "c": ("unknown",), "d": ()}.items()
    ]
    times = LayerTimes(profiler="x", runs=1, whole_ms=4.0, remainder_ms=0.0, kernels=tuple(kernels))

    found = _layers.named(times, NAMES)

    assert [one.layers for one in found.kernels] == [("relu",), ("conv", "relu"), ("unknown",), ()]


def test_names_are_read_without_the_onnx_package(tiny, tmp_path):
    import onnx

    path = tiny["write"](tmp_path / "tiny.onnx")

    names = _layers.read_names(path)

    nodes = onnx.load(path).graph.node
    assert [(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in nodes] == [
        (n.name, n.op_type, n.inputs, n.outputs) for n in names.by_name.values()
    ]
    assert set(names.by_output) == {output for n in nodes for output in n.output}


@pytest.mark.parametrize(
    "content", [b"", b"<xml/>", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x3a\x7f", b"\xff" * 40]
)
def test_what_is_no_onnx_file_has_no_names(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)

    assert _layers.read_names(path) == _layers.Names()
    assert _layers.read_names(tmp_path / "none") == _layers.Names()


def test_profiling_needs_no_onnx_package(built, tiny, tmp_path):
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("needs onnxruntime")
    import subprocess
    import sys

    _, path = built("onnxruntime", False)
    code = (
        "import sys, numpy as np; from pathlib import Path; from rdeploy import backends;"
        f"backends.find('onnxruntime').layer_times(Path({str(path)!r}), {{'x': np.zeros((1, 3, 16, 16), np.float32)}});"
        "print(sorted({'onnx', 'torch'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
