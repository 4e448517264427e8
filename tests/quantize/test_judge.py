"""How a draft is judged: over all outputs of a network, each by its own size."""

import runpy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

from rdeploy.errors import StageError  # noqa: E402
from rdeploy.quantize import judge, recipe, spooled  # noqa: E402
from rdeploy.quantize.ranges import float_outputs  # noqa: E402
from rdeploy.types import QuantOptions, QuantScheme  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]
SCHEME = QuantScheme(name="affine", activations="uint8", ops=("Conv", "MatMul"))
ONE = np.ones(50)


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
    assert judge.sqnr_db([[ONE, 100 * ONE]] * 2, [found] * 2) == pytest.approx(expected)


def test_an_output_that_is_not_finite_has_the_worst_score_there_is():
    assert judge.sqnr_db([[ONE, ONE]], [[ONE, ONE * np.nan]]) == -np.inf
    assert judge.sqnr_db([[ONE]], [[ONE * np.inf]]) == -np.inf


def test_what_is_masked_in_the_reference_is_left_out():
    masked, found = np.append(ONE, -np.inf), np.append(1.1 * ONE, -1e30)

    assert judge.sqnr_db([[masked]], [[found]]) == pytest.approx(20.0)
    assert judge.sqnr_db([[masked * np.nan, ONE]], [[found, ONE]]) == 200.0


def test_a_network_with_masked_logits_is_quantized(tmp_path):
    mask = np.where(np.arange(4) == 2, -np.inf, 0.0).astype(np.float32).reshape(1, 4, 1, 1)
    path = TEXT["write"](tmp_path / "m.onnx", "c = Conv(x, w) y = Add(c, k)", w=W(4, 3, 1, 1), k=mask)
    batches = [W(1, 3, 8, 8, seed=i) for i in range(8)]

    seen = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=batches)
    recipe.quantize(seen, tmp_path / "int8.onnx", scheme=SCHEME, images=batches, options=QuantOptions())

    exact, found = (TEXT["run"](p, batches[0]) for p in (path, tmp_path / "int8.onnx"))
    assert np.isneginf(found[0, 2]).all()
    assert judge.sqnr_db([[exact]], [[found]]) > 20


def test_a_draft_that_is_not_finite_does_not_stop_the_others(tmp_path, monkeypatch):
    path = TEXT["write"](tmp_path / "m.onnx", "y = Conv(x, w)", w=W(4, 3, 1, 1))
    batches = [W(1, 3, 8, 8, seed=i) for i in range(8)]
    seen, score = recipe.calibrate(path, tmp_path, schemes=[SCHEME], images=batches), judge.Judge.score
    broken = ["minmax"]

    def scored(self, draft, repair):
        return -np.inf if draft.calibrator in broken else score(self, draft, repair)

    def quantize():
        return recipe.quantize(seen, tmp_path / "o.onnx", scheme=SCHEME, images=batches, options=QuantOptions())

    monkeypatch.setattr(judge.Judge, "score", scored)
    assert quantize().calibrator != "minmax"
    broken += ["percentile", "mean_extremes", "mse", "gradient"]
    with pytest.raises(StageError, match="gives NaN or infinity on calibration images, whatever its ranges"):
        quantize()


@pytest.mark.parametrize("count", [64, 512])
def test_what_is_kept_of_the_outputs_does_not_grow_with_the_images(count, tmp_path, monkeypatch):
    """64 or 512 images of 64 kB each, at most 256 kB of them in memory."""
    monkeypatch.setattr(spooled, "IN_MEMORY_BYTES", 1 << 18)
    monkeypatch.setattr(judge, "SCORED", count)
    path = TEXT["write"](tmp_path / "m.onnx", "y = Identity(x)", x=(1, 1, 128, 128))
    images = judge.Chosen([W(1, 1, 128, 128)], [0] * 2 * count)
    tracemalloc.start()

    scorer = judge.Judge(path, path, SCHEME, images, {}, ())

    assert judge.sqnr_db(scorer._reference, float_outputs(path, scorer._scored)) == 200.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(scorer._reference) == count
    assert peak < 4 << 20


def test_indices_among_the_outputs_are_not_scored(tmp_path):
    body = "y = Conv(x, w) i = ArgMax<axis=1>(y) z = Identity(y)"
    path = TEXT["write"](tmp_path / "m.onnx", body, outputs=("y", "z"), w=W(4, 3, 1, 1))
    import onnx

    proto = onnx.load(path)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, (1, 1, 8, 8)))
    onnx.save(proto, path)

    found = list(float_outputs(path, [W(1, 3, 8, 8), W(1, 3, 8, 8, seed=1)]))

    assert [[values.size for values in row] for row in found] == [[256, 256], [256, 256]]


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
