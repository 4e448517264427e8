"""How a draft is judged: over all outputs of a network, each by its own size."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

from rdeploy.errors import StageError  # noqa: E402
from rdeploy.quantize import judge, recipe  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SCHEME = QuantScheme(name="affine", activations="uint8", ops=("Conv", "MatMul"))
ONE = np.ones((2, 50))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([ONE, 100 * ONE], 200.0),
        ([1.1 * ONE, 100 * ONE], -10 * np.log10(0.01 / 2)),
        ([ONE, 110 * ONE], -10 * np.log10(0.01 / 2)),
        ([1.1 * ONE, 110 * ONE], 20.0),
    ],
)
def test_every_output_counts_by_its_own_size(found, expected):
    assert judge.sqnr_db([ONE, 100 * ONE], found) == pytest.approx(expected)


def test_an_output_that_is_not_finite_is_an_error():
    with pytest.raises(StageError, match="gives NaN or infinity on calibration images"):
        judge.sqnr_db([ONE, ONE], [ONE, ONE * np.nan])


def test_indices_among_the_outputs_are_not_scored(tmp_path):
    body = "y = Conv(x, w) i = ArgMax<axis=1>(y) z = Identity(y)"
    path = TEXT["write"](tmp_path / "m.onnx", body, outputs=("y", "z"), w=W(4, 3, 1, 1))
    import onnx

    proto = onnx.load(path)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, (1, 1, 8, 8)))
    onnx.save(proto, path)

    found = judge.outputs(path, [W(1, 3, 8, 8), W(1, 3, 8, 8, seed=1)])

    assert [rows.shape for rows in found] == [(2, 256), (2, 256)]


def test_what_only_the_second_output_reads_is_repaired_as_well(tmp_path):
    """The first output is exact in INT8; the choice of the calibrator is made for the second."""
    body = "z = Conv(x, v) a = Conv(x, w) r = Relu(a) y = Conv(r, u)"
    arrays = {"v": np.zeros((1, 3, 1, 1), np.float32), "w": W(8, 3, 1, 1), "u": W(4, 8, 1, 1)}
    path = TEXT["write"](tmp_path / "m.onnx", body, outputs=("z", "y"), **arrays)
    batches = [W(1, 3, 8, 8, seed=i) for i in range(8)]

    seen = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=batches, recipe="fast")
    found = recipe.quantize(seen, tmp_path / "int8.onnx", scheme=SCHEME, images=batches, options=QuantOptions())

    assert any(line.startswith("bias correction") and "200" not in line for line in found.recipe)
    assert "200.0 dB" not in " ".join(found.recipe)
