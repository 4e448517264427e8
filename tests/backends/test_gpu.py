"""On a real GPU: engines of the TensorRT family give what the reference gives, with and without CUDA graphs."""

import numpy as np
import pytest

from rdeploy import backends, hardware
from rdeploy.backends import _cuda
from rdeploy.types import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hardware.gpus(), reason="there is no NVIDIA GPU here"),
]
TARGET = Target(name="gpu", batch_sizes=(1, 4))


@pytest.fixture(params=["tensorrt", "tensorrt_rtx", "onnxruntime_cuda"])
def plugin(request):
    module = backends.find(request.param)
    if (reason := module.unavailable()) is not None:
        pytest.skip(reason)
    return module


def built(plugin, tiny, tmp_path, **how):
    onnx = tiny["write"](tmp_path / "m.onnx", batch="n", opset=17, **how)
    engine = plugin.build_engine(onnx, tmp_path / "e", target=TARGET, options=plugin.Options())
    if (reason := plugin.cannot_run(engine)) is not None:
        pytest.skip(reason)
    return tmp_path / "e" / engine.path, tmp_path / "m.onnx"


def reference(onnx, tmp_path, pixels):
    plugin = backends.find("reference")
    engine = plugin.build_engine(onnx, tmp_path / "r", target=TARGET, options=plugin.Options())
    with plugin.open_session(tmp_path / "r" / engine.path) as session:
        return session.run({"x": pixels})["y"]


@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "int8"])
def test_outputs_equal_the_reference(plugin, tiny, tmp_path, quantized):
    path, onnx = built(plugin, tiny, tmp_path, scheme=plugin.scheme(TARGET) if quantized else None)
    pixels = tiny["image"](4)
    wanted = reference(onnx, tmp_path, pixels)

    with plugin.open_session(path) as session:
        for count in (4, 1, 4, 4, 1, 1):  # the third of a size is launched as a graph
            made = session.run({"x": pixels[:count]})["y"]
            np.testing.assert_allclose(made, wanted[:count], rtol=0, atol=0.02 * np.abs(wanted).max())


def test_a_stream_gives_what_single_runs_give(plugin, tiny, tmp_path):
    path, _ = built(plugin, tiny, tmp_path)
    batches = [tiny["image"](2, seed=seed) for seed in range(6)]

    with plugin.open_session(path) as session:
        if not hasattr(session, "stream"):
            pytest.skip("this runtime has no pipeline")
        singly = [session.run({"x": batch})["y"] for batch in batches]
        together = [made["y"] for made in session.stream({"x": batch} for batch in batches)]

    for one, other in zip(singly, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_device_memory_comes_back(plugin, tiny, tmp_path):
    path, _ = built(plugin, tiny, tmp_path)
    cuda = _cuda.Cuda(_cuda.load())

    def free_after_a_session():
        with plugin.open_session(path) as session:
            session.run({"x": tiny["image"](4)})
        return cuda.free_and_total_bytes()[0]

    free_after_a_session()  # what the runtime keeps for good
    first, second = free_after_a_session(), free_after_a_session()

    assert first - second < 16 << 20
