"""The largest INT8 weight of a file, read without onnx, and what ONNX Runtime does about it on a CPU without VNNI."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from rdeploy import hardware
from rdeploy.backends import onnxruntime
from rdeploy.backends._int8_weights import holds_float16, largest_int8_weight
from rdeploy.types import Target

onnx = pytest.importorskip("onnx", reason="writes the networks")
TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
needs_onnxruntime = pytest.mark.skipif(onnxruntime.unavailable() is not None, reason=str(onnxruntime.unavailable()))

QDQ = """
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) k = DequantizeLinear(w, t)
    c = Conv(d, k) o = QuantizeLinear(c, u, v) y = DequantizeLinear(o, u, v)
"""


def network(path, *, weight):
    """A 1x1 convolution over two channels whose products add up to 2 x 255 x `weight`."""
    arrays = {
        "w": np.full((1, 2, 1, 1), weight, np.int8), "t": np.float32(1 / 128),
        "s": np.float32(1 / 255), "z": np.uint8(0), "u": np.float32(2 / 255), "v": np.uint8(0),
    }  # fmt: skip
    return TEXT["write"](path, QDQ, x=(1, 2, 4, 4), **arrays)


@pytest.mark.parametrize("weight", [-128, -64, 0, 63, 127])
def test_the_largest_weight_is_found(tmp_path, weight):
    assert largest_int8_weight(network(tmp_path / "m.onnx", weight=weight)) == abs(weight)


def test_only_int8_initializers_count(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "y = Conv(x, w)", w=np.full((4, 3, 3, 3), 200, np.float32))

    assert largest_int8_weight(path) == 0


@pytest.mark.parametrize("weight", [3, -100])
def test_weights_that_are_written_as_integers_are_read_too(tmp_path, weight):
    model = onnx.load(str(network(tmp_path / "m.onnx", weight=3)))
    tensor = next(i for i in model.graph.initializer if i.name == "w")
    tensor.int32_data.extend([weight, weight])
    tensor.ClearField("raw_data")
    onnx.save(model, str(tmp_path / "m.onnx"))

    assert largest_int8_weight(tmp_path / "m.onnx") == abs(weight)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05\x2a\x03\x10\x03", b"\xff" * 40]
)
def test_what_is_no_model_holds_no_weights(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)

    assert largest_int8_weight(path) == 0


@needs_onnxruntime
@pytest.mark.parametrize(
    ("flags", "weight", "in_float"),
    [("avx2", 127, True), ("avx2", 64, False), ("avx2 avx512_vnni", 127, False)],
)
def test_a_graph_whose_sums_would_saturate_here_runs_in_float(tmp_path, monkeypatch, flags, weight, in_float):
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "_read", lambda path: f"flags : {flags}\n" if path.name == "cpuinfo" else "")
    onnx_file = network(tmp_path / "m.onnx", weight=weight)

    engine = onnxruntime.build_engine(onnx_file, tmp_path / "e", target=Target(name="t"), options=onnxruntime.Options())

    assert ("int8" not in dict(engine.executed_precision)) == in_float


@needs_onnxruntime
def test_a_sum_of_full_range_products_is_right_on_every_cpu(tmp_path):
    with onnxruntime.open_session(network(tmp_path / "m.onnx", weight=127)) as session:
        found = session.run({"x": np.ones((1, 2, 4, 4), np.float32)})["y"]

    assert found == pytest.approx(2 * 127 / 128, abs=1 / 255)  # 16 bits would hold 32767 of 64770: 1.0 at most


FP16 = """
    h = Cast<to=10>(x) q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) k = DequantizeLinear(w, t)
    c = Conv(d, k, b) o = QuantizeLinear(c, u, z) e = DequantizeLinear(o, u, z) y = Cast<to=1>(e)
"""


def fp16_network(path, *, step):
    """A 1x1 convolution with FP16 scales, as graphs for TensorRT have: `step` in, one output with a bias."""
    arrays = {
        "w": np.full((1, 2, 1, 1), 64, np.int8), "t": np.full(1, step, np.float16),
        "s": np.float16(step), "z": np.int8(0), "b": np.full(1, 1.5, np.float16), "u": np.float16(4 / 127),
    }  # fmt: skip
    return TEXT["write"](path, FP16, x=(1, 2, 4, 4), opset=19, **arrays)


def test_fp16_constants_are_seen(tmp_path):
    assert holds_float16(fp16_network(tmp_path / "m.onnx", step=0.1))
    assert not holds_float16(network(tmp_path / "n.onnx", weight=3))
    assert not holds_float16(tmp_path / "none.onnx")


@needs_onnxruntime
@pytest.mark.parametrize("step", [0.01, 1e-4])
def test_scales_whose_product_is_no_fp16_number_give_what_the_graph_says(tmp_path, step):
    step = float(np.float16(step))
    with onnxruntime.open_session(fp16_network(tmp_path / "m.onnx", step=step)) as session:
        found = session.run({"x": np.full((1, 2, 4, 4), 100 * step, np.float32)})["y"]

    assert found == pytest.approx(2 * 100 * step * 64 * step + 1.5, abs=0.1)  # the scales are FP16
