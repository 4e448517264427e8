"""Pairs that a runtime would refuse, or silently misread, are found before anything is built."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

from rdeploy.errors import InvariantError  # noqa: E402
from rdeploy.quantize import check  # noqa: E402
from rdeploy.types import QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
AFFINE = QuantScheme(name="affine", activations="uint8", ops=("Conv",))
SYMMETRIC = QuantScheme(name="symmetric", activations="int8", ops=("Conv",))

BODY = """
    q = QuantizeLinear(x, step, zero) d = DequantizeLinear(q, step, zero)
    wd = DequantizeLinear<axis=0>(w, w_step, w_zero)
    c = Conv(d, wd) r = Relu(c) y = Conv(r, v)
"""


def write(folder, body=BODY, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "step": np.float32(0.1),
        "zero": np.int8(0),
        "w": rng.integers(-127, 128, (4, 3, 1, 1)).astype(np.int8),
        "w_step": np.full(4, 0.01, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "v": rng.normal(size=(2, 4, 1, 1)).astype(np.float32),
    }
    return TEXT["write"](folder / "int8.onnx", body, **(arrays | changes))


def refused(path, scheme):
    with pytest.raises(InvariantError) as caught:
        check.check_legal(path, scheme)
    return str(caught.value)


def test_legal_pairs_pass(tmp_path):
    check.check_legal(write(tmp_path), SYMMETRIC)
    check.check_legal(write(tmp_path, zero=np.uint8(128)), AFFINE)


def test_unsigned_activations_are_refused_in_the_symmetric_scheme(tmp_path):
    message = refused(write(tmp_path, zero=np.uint8(0)), SYMMETRIC)

    assert message == "quantize: QuantizeLinear 'q' in int8.onnx is UINT8, not INT8"


def test_signed_activations_are_refused_in_the_affine_scheme(tmp_path):
    assert refused(write(tmp_path), AFFINE) == "quantize: QuantizeLinear 'q' in int8.onnx is INT8, not UINT8"


def test_a_zero_point_is_refused_in_the_symmetric_scheme(tmp_path):
    message = refused(write(tmp_path, zero=np.int8(3)), SYMMETRIC)

    assert message == "quantize: QuantizeLinear 'q' in int8.onnx has a zero point other than 0"


@pytest.mark.parametrize("scheme", [SYMMETRIC, AFFINE], ids=lambda s: s.name)
def test_asymmetric_weights_are_refused_in_every_scheme(scheme, tmp_path):
    zero = np.int8(0) if scheme is SYMMETRIC else np.uint8(7)

    message = refused(write(tmp_path, zero=zero, w_zero=np.array([0, 0, 1, 0], np.int8)), scheme)

    assert message == "quantize: DequantizeLinear 'wd' in int8.onnx has a zero point other than 0"


def test_an_int32_bias_is_refused(tmp_path):
    body = BODY.replace("c = Conv(d, wd)", "bd = DequantizeLinear<axis=0>(b, w_step, b_zero) c = Conv(d, wd, bd)")

    message = refused(write(tmp_path, body, b=np.ones(4, np.int32), b_zero=np.zeros(4, np.int32)), SYMMETRIC)

    assert message == "quantize: DequantizeLinear 'bd' in int8.onnx is INT32, not INT8"


def test_a_constant_that_is_quantized_at_run_time_is_refused(tmp_path):
    body = BODY.replace(
        "y = Conv(r, v)", "vq = QuantizeLinear(v, step, zero) vd = DequantizeLinear(vq, step, zero) y = Conv(r, vd)"
    )

    message = refused(write(tmp_path, body), SYMMETRIC)

    assert message == "quantize: QuantizeLinear 'vq' in int8.onnx quantizes a constant at run time"


def test_a_pair_without_a_zero_point_is_refused(tmp_path):
    body = BODY.replace(
        "QuantizeLinear(x, step, zero) d = DequantizeLinear(q, step, zero)",
        "QuantizeLinear(x, step) d = DequantizeLinear(q, step)",
    )

    assert refused(write(tmp_path, body), AFFINE).endswith("'q' in int8.onnx has no constant zero point")


def test_coverage_is_the_share_of_the_work_with_int8_weights(tmp_path):
    path = write(tmp_path)

    assert check.coverage(path) == (4 * 3) / (4 * 3 + 2 * 4)
    assert check.float_layers(path) == ("y",)


def test_coverage_of_a_graph_without_weighted_layers_is_nothing(tmp_path):
    assert check.coverage(TEXT["write"](tmp_path / "m.onnx", "y = Relu(x)")) == 0
