"""What the output answers to a rounding, in closed form."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx_ir as ir  # noqa: E402

from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.quantize.adjoint import responses  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parents[2] / "onnx_text.py"))
PAIR = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHTS = "k = DequantizeLinear<axis=0>(w, t)"
STEP, STEPS = np.float32(0.1), np.float32([0.01, 0.02])
IMAGES = [np.float32(v).reshape(1, 1, 2, 2) for v in ([0.04, 0.16, -0.26, 99], [0.31, 0.07, 0.0, -0.12])]
SEEN = [np.float32(v).reshape(1, 1, 2, 2) for v in ([0.0, 0.2, -0.3, 12.7], [0.3, 0.1, 0.0, -0.1])]
"""What the images are behind the pair; 99 is clipped."""


def graph(folder, body, **constants):
    facts = {"s": STEP, "z": np.uint8(128), "t": STEPS} | constants
    return TEXT["write"](folder / "m.onnx", body, x=(1, 1, 2, 2), **facts)


def drawn(count, *shape):
    generator = np.random.default_rng(0)
    return [2.0 * generator.integers(0, 2, shape) - 1.0 for _ in range(count)]


@pytest.mark.parametrize("check", [True, False], ids=["shapes known", "shapes not told"])
def test_a_convolution_answers_to_its_read_and_its_weights_less_what_its_bias_takes_back(check, tmp_path):
    """y_o = sum of w_o d: an error e of d is felt as sum of v_o w_o e, one of w_o as v_o sum of d."""
    weight = np.array([[100], [-50]], np.int8).reshape(2, 1, 1, 1)
    body = f"{PAIR} {WEIGHTS} c = Conv(d, k) y = ReduceSum<keepdims=0>(c, a)"
    path = graph(tmp_path, body, w=weight, a=np.array([2, 3]), check=check)
    errors = [seen - image for seen, image in zip(SEEN, IMAGES)]
    mean_error, mean_seen = np.mean(errors), np.mean(SEEN)

    found = list(responses.probe(path, IMAGES, 2))

    signs = drawn(4, 1, 2)
    for index, one in enumerate(found):
        v, error, seen = signs[index], errors[index // 2], SEEN[index // 2]
        slope = (v * (100 * 0.01, -50 * 0.02)).sum()
        assert one.reads == {("c", 0): pytest.approx(slope * (error - mean_error).sum(), abs=1e-4)}
        slopes = v[0] * (seen.sum() - 4 * mean_seen)
        assert one.weights == {"c": pytest.approx((slopes * STEPS) @ (slopes * STEPS) / 12, rel=1e-4)}


def test_two_readers_of_one_pair_answer_each_for_itself(tmp_path):
    path = graph(tmp_path, f"{PAIR} a = Mul(d, three) y = Add(a, d)", three=np.float32([3]))
    error = (SEEN[0] - IMAGES[0]).reshape(-1)

    found = next(responses.probe(path, IMAGES[:1], 1))

    felt = (drawn(1, 1, 1, 2, 2)[0].reshape(-1) * error).sum()
    assert found.reads == {("a", 0): pytest.approx(3 * felt, rel=1e-5), ("y", 1): pytest.approx(felt, rel=1e-5)}
    assert found.weights == {}


@pytest.mark.parametrize(
    ("layer", "weight"), [("MatMul(f, k)", (4, 2)), ("Gemm<transB=1>(f, k)", (2, 4)), ("Gemm(f, k)", (4, 2))]
)
def test_weights_whose_mean_input_a_bias_takes_back(layer, weight, tmp_path):
    """Every image is the mean where there is one image: nothing is left of its weights' noise."""
    body = f"{PAIR} f = Reshape(d, flat) k = DequantizeLinear<axis={weight.index(2)}>(w, t) y = {layer}"
    path = graph(tmp_path, body, w=np.full(weight, 7, np.int8), flat=np.array([1, 4]))

    alone = next(responses.probe(path, IMAGES[:1], 1))
    both = next(responses.probe(path, IMAGES, 1))

    assert alone.weights == {"y": pytest.approx(0, abs=1e-12)}
    moved = SEEN[0].reshape(-1) - np.mean(SEEN, axis=0).reshape(-1)
    assert both.weights == {"y": pytest.approx((moved @ moved) * (STEPS @ STEPS) / 12, rel=1e-4)}


def test_steps_are_broadcast_against_their_weights(tmp_path):
    path = graph(tmp_path, f"{PAIR} {WEIGHTS} y = Conv(d, k)", w=np.ones((2, 1, 1, 1), np.int8))

    steps = responses.weight_steps(ir.load(path).graph)

    assert {name: step.shape for name, step in steps.items()} == {"y": (2, 1, 1, 1)}
    assert np.array_equal(steps["y"].reshape(-1), STEPS)


def test_what_was_not_quantized_before_it_is_refused_by_name(tmp_path):
    body = "q = QuantizeLinear(x, s, z) p = Reshape(q, flat) d = DequantizeLinear(p, s, z) y = Neg(d)"
    path = graph(tmp_path, body, flat=np.array([1, 4]))

    with pytest.raises(Unsupported) as caught:
        next(responses.probe(path, IMAGES, 1))

    assert str(caught.value) == "'d' dequantizes what was not quantized before it"


def test_pytorch_is_not_imported(tmp_path):
    path = graph(tmp_path, f"{PAIR} {WEIGHTS} y = Conv(d, k)", w=np.ones((2, 1, 1, 1), np.int8))
    code = (
        "import sys, numpy as np; from pathlib import Path; from rdeploy.quantize import mixed, sensitivity; "
        "from rdeploy.quantize.adjoint import responses; "
        f"assert list(responses.probe(Path({str(path)!r}), [np.ones((1, 1, 2, 2), np.float32)], 2)); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_onnx_runtime_refuses_is_a_reason(tmp_path, monkeypatch):
    path = graph(tmp_path, f"{PAIR} {WEIGHTS} y = Conv(d, k)", w=np.ones((2, 1, 1, 1), np.int8))

    def refuse(model):
        raise RuntimeError("no kernel\nin many lines")

    monkeypatch.setattr("rdeploy.quantize.ranges.session_of", refuse)

    with pytest.raises(Unsupported) as caught:
        next(responses.probe(path, IMAGES, 1))

    assert str(caught.value) == "ONNX Runtime takes no gradients of it: no kernel"


def test_an_error_that_is_not_a_number_counts_for_nothing(tmp_path):
    """The logarithm of 0 has no gradient that could be used."""
    path = graph(tmp_path, f"{PAIR} z0 = Sub(d, d) l = Log(z0) y = Add(l, d)")

    found = next(responses.probe(path, IMAGES[:1], 1))

    assert np.isfinite(list(found.reads.values())).all()
