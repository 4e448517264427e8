"""What is watched over the images, and the ranges that come of it."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.quantize import calibrators  # noqa: E402
from rdeploy.quantize.histogram import Histogram  # noqa: E402
from rdeploy.quantize.ranges import activations, find_ranges, observe, session_of  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
BODY = "r = Relu(x) c = Conv(r, w) y = Neg(c)"


def network(folder):
    return TEXT["write"](folder / "m.onnx", BODY, w=TEXT["normal"](4, 3, 1, 1))


def batches(count=5):
    return [TEXT["normal"](1, 3, 8, 8, seed=i) for i in range(count)]


def test_inputs_outputs_and_what_lies_between_are_watched_in_one_pass(tmp_path):
    path = network(tmp_path)

    found = observe(path, ["x", "r", "c", "y"], iter(batches()))

    everything = {
        "x": np.concatenate(batches()),
        **{
            name: np.concatenate([TEXT["run"](path, b) for b in batches()]) * sign
            for name, sign in (("y", 1), ("c", -1))
        },
    }
    for name, values in everything.items():
        assert (found[name].low, found[name].high) == pytest.approx((values.min(), values.max()), rel=1e-5)
        assert found[name].batches == 5
    assert found["r"].zeros > 0
    assert found["r"].low == 0


def test_a_channel_that_matters_to_the_next_layer_counts_as_much_in_the_histogram(tmp_path):
    weight = np.array([[1.0, 0.0, 0.0]], np.float32).reshape(1, 3, 1, 1)
    path = TEXT["write"](tmp_path / "m.onnx", "y = Conv(x, w)", w=weight)

    histogram = observe(path, ["x"], batches(1))["x"]

    assert histogram.weights.tolist() == [3, 0, 0]
    assert histogram.counts.sum() == 3 * 64


def test_only_the_named_activations_are_kept(tmp_path):
    found = list(activations(network(tmp_path), ["c"], iter(batches(2)), threads=1))

    assert [set(values) for values in found] == [{"c"}, {"c"}]
    assert [list(v) for v in activations(network(tmp_path), ["x"], batches(1))] == [["x"]]


def seen(values):
    histogram = Histogram()
    histogram.update(np.asarray(values, np.float32))
    return histogram


def ranges(shared, **tensors):
    histograms = {name: seen(values) for name, values in tensors.items()}
    options = calibrators.find("minmax").Options()
    return find_ranges(histograms, calibrator="minmax", options=options, symmetric=False, shared=shared)


def test_tensors_that_share_a_range_get_their_hull():
    found = ranges([{"a", "b"}], a=[0, 2], b=[-1, 1], c=[0, 9])

    assert found == {"a": (-1, 2), "b": (-1, 2), "c": (0, 9)}


def test_a_group_of_tensors_that_were_not_seen_is_left_out():
    assert ranges([{"x", "y"}], a=[0, 1]) == {"a": (0, 1)}


def test_a_session_over_a_graph_in_memory_reads_its_weights_from_a_file(tmp_path):
    """The graph lets go of them, and the session keeps no bytes that it was made of."""
    path = network(tmp_path)
    model = ir.load(path)

    session = session_of(model)

    image = batches(1)[0]
    assert np.array_equal(session.run(None, {"x": image})[0], TEXT["run"](path, image))
    assert [value.const_value for value in model.graph.initializers.values()] == [None]
    assert getattr(session, "_model_bytes", None) is None
