"""What a graph costs: counted by hand on graphs of a few nodes, and against the literature on whole networks."""

import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402

from rdeploy.graph import cost  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
W = TEXT["normal"]


def summarized(folder, body, **facts):
    return cost.summarize(TEXT["write"](folder / "m.onnx", body, **facts))


def test_a_convolution(tmp_path):
    found = summarized(tmp_path, "y = Conv<pads=[1,1,1,1]>(x, w, b)", w=W(4, 3, 3, 3), b=W(4))

    assert found.macs == 8 * 8 * 4 * (3 * 3 * 3)
    assert found.params == 4 * 3 * 3 * 3 + 4
    assert found.weight_bytes == 4 * found.params
    assert found.activation_bytes == 4 * (3 + 4) * 64


@pytest.mark.parametrize(
    ("body", "shape", "macs"),
    [
        ("y = Conv<strides=[2,2]>(x, w)", (4, 3, 2, 2), 4 * 4 * 4 * 12),
        ("y = Conv<group=3, pads=[1,1,1,1]>(x, w)", (6, 1, 3, 3), 64 * 6 * 9),
        ("y = Conv<dilations=[2,2]>(x, w)", (4, 3, 3, 3), 4 * 4 * 4 * 27),
        ("y = ConvTranspose<strides=[2,2]>(x, w)", (3, 4, 2, 2), 16 * 16 * 4 * 3),
        ("y = ConvTranspose<strides=[2,2], group=3>(x, w)", (3, 2, 2, 2), 16 * 16 * 6),
    ],
)
def test_a_convolution_of_every_kind(body, shape, macs, tmp_path):
    assert summarized(tmp_path, body, w=W(*shape)).macs == macs


@pytest.mark.parametrize(
    ("body", "x", "shape", "macs"),
    [
        ("y = Gemm<transB=1>(x, w)", (1, 8), (5, 8), 40),
        ("y = Gemm(x, w)", (1, 8), (8, 5), 40),
        ("y = Gemm<transA=1>(x, w)", (8, 3), (8, 5), 3 * 8 * 5),
        ("y = MatMul(x, w)", (1, 7, 8), (8, 5), 7 * 8 * 5),
        ("y = MatMul(w, x)", (1, 8, 7), (5, 8), 5 * 8 * 7),
    ],
)
def test_a_linear_layer_of_every_kind(body, x, shape, macs, tmp_path):
    assert summarized(tmp_path, body, x=x, w=W(*shape)).macs == macs


def test_attention_counts_and_normalisation_does_not(tmp_path):
    body = """
        n = LayerNormalization<axis=-1>(x, g) t = Transpose<perm=[0,1,3,2]>(n)
        a = MatMul(n, t) p = Softmax<axis=-1>(a) y = MatMul(p, n)
    """

    found = summarized(tmp_path, body, x=(1, 2, 5, 8), g=W(8))

    assert found.macs == 2 * (2 * 5 * 5 * 8)
    assert found.params == 8


def test_a_dynamic_batch_counts_as_one(tmp_path):
    fixed = summarized(tmp_path, "y = Conv(x, w)", w=W(4, 3, 1, 1))
    dynamic = summarized(tmp_path, "y = Conv(x, w)", x=("n", 3, 8, 8), w=W(4, 3, 1, 1))

    assert dynamic == fixed


def test_a_file_without_inner_shapes_costs_the_same(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", "c = Conv(x, w) y = Conv(c, v)", w=W(4, 3, 1, 1), v=W(2, 4, 1, 1))
    known = cost.summarize(path)
    model = onnx.load(str(path))
    del model.graph.value_info[:]
    onnx.save(model, str(path))

    assert cost.summarize(path) == known


def test_shapes_and_scalars_are_no_parameters(tmp_path):
    body = "c = Mul(x, two) r = Reshape(c, shape) y = MatMul(r, w)"

    found = summarized(tmp_path, body, two=np.float32(2), shape=np.array([1, 192]), w=W(192, 2))

    assert found.params == 384


@pytest.mark.parametrize(
    ("body", "peak"),
    [
        ("y = Softplus(x)", 2),  # x and y
        ("a = Softplus(x) b = Softplus(a) y = Softplus(b)", 2),  # two at a time
        ("a = Softplus(x) b = Softplus(x) y = Mul(a, b)", 3),  # the diamond: a waits for b
        ("a = Softplus(x) b = Softplus(a) c = Softplus(b) y = Mul(c, a)", 3),  # a waits for c
        ("a = Softplus(x) b = Softplus(a) c = Softplus(b) d = Softplus(x) y = Mul(c, d)", 3),  # x waits for d
        ("a = Relu(x) b = Relu(a) y = Relu(b)", 1),  # in place
        ("a = Relu(x) b = Softplus(x) y = Mul(a, b)", 3),  # x is read again: not in place
        ("a = Flatten(x) y = Softplus(a)", 2),  # a view
        ("a = Softplus(x) y = Softplus(x)", 2),  # a is never read: it dies at once
        ("a = Softplus(x) b = Softplus(x) y = Softplus(x)", 2),
    ],
)
def test_the_live_activations_of_a_small_graph(body, peak, tmp_path):
    assert summarized(tmp_path, body).activation_bytes == peak * 4 * 3 * 64


def test_an_output_of_the_graph_lives_to_its_end(tmp_path):
    found = summarized(tmp_path, "a = Softplus(x) b = Softplus(a) y = Softplus(b)", outputs=("a", "y"))

    assert found.activation_bytes == 3 * 4 * 3 * 64


FLOAT = "r = Tanh(x) c = Conv<pads=[1,1,1,1]>(r, w) y = Tanh(c)"
QUANTIZED = """
    r = Tanh(x) q = QuantizeLinear(r, step, zero) d = DequantizeLinear(q, step, zero)
    wd = DequantizeLinear<axis=0>(w8, w_step, w_zero)
    c = Conv<pads=[1,1,1,1]>(d, wd) y = Tanh(c)
"""
PAIRS = {
    "step": np.float32(0.01),
    "zero": np.uint8(0),
    "w8": np.ones((3, 3, 3, 3), np.int8),
    "w_step": np.full(3, 0.01, np.float32),
    "w_zero": np.zeros(3, np.int8),
}


def test_int8_weights_take_a_byte_and_an_activation_that_only_integers_read_takes_one_too(tmp_path):
    exact = summarized(tmp_path, FLOAT, w=W(3, 3, 3, 3))
    quantized = summarized(tmp_path, QUANTIZED, **PAIRS)

    assert quantized.macs == exact.macs
    assert quantized.params == exact.params == 81
    assert quantized.weight_bytes == 81 + 3 * 4 + 3 + 4 + 1
    assert exact.weight_bytes == 4 * 81
    assert quantized.activation_bytes < exact.activation_bytes


def test_layers_say_their_precision_and_pairs_are_left_out(tmp_path):
    path = TEXT["write"](tmp_path / "m.onnx", QUANTIZED, **PAIRS)

    found = {layer.name: layer for layer in cost.layers(path)}

    assert list(found) == ["r", "c", "y"]
    assert {name: layer.precision for name, layer in found.items()} == {"r": "fp32", "c": "int8", "y": "fp32"}
    assert found["c"].op == "Conv"
    assert found["c"].shape == (1, 3, 8, 8)
    assert found["c"].macs == 64 * 81
    assert found["c"].params == 81
    assert found["c"].activation_bytes == 4 * 3 * 64


def test_a_float16_graph_says_so(tmp_path):
    body = "h = Cast<to=10>(x) c = Conv(h, w) y = Cast<to=1>(c)"

    path = TEXT["write"](tmp_path / "m.onnx", body, w=W(4, 3, 1, 1).astype(np.float16))

    assert [layer.precision for layer in cost.layers(path)] == ["fp16", "fp16", "fp32"]
    assert cost.summarize(path).weight_bytes == 2 * 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export one of timm's networks with random weights: returns the module and the path of its graph."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'rdeploy[torch]'")
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'rdeploy[zoo]'")
    from rdeploy import export
    from rdeploy.types import ModelSpec, Preprocessing

    def make(name, side, **kwargs):
        scaling = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
        spec = ModelSpec(name=name, source="", sha256="", native_resolution=(side, side), preprocessing=scaling)
        module = timm.create_model(name, pretrained=False, **kwargs).eval()
        path = tmp_path_factory.mktemp("costs") / "m.onnx"
        return module, Path(export.export(module, spec, (side, side), path).path)

    return make


RESNET_50 = {224: 4.089, 192: 3.005, 160: 2.087, 128: 1.337, 96: 0.753}
VIT_S_16 = {224: 4.599, 192: 3.315, 160: 2.268, 128: 1.438, 96: 0.809}


def test_a_resnet_50_costs_what_the_literature_says_at_every_size(exported):
    import onnx_ir as ir

    from rdeploy.graph import spatial

    module, path = exported("resnet50", 224)
    found = cost.summarize(path)
    model = ir.load(path)
    gmacs = {}
    for side in RESNET_50:
        if side != 224:
            spatial.resize(model, (side, side))  # shapes only, the weights stay as they are
        gmacs[side] = sum(layer.macs for layer in cost.layers_of(model.graph)) / 1e9

    assert gmacs == pytest.approx(RESNET_50, rel=0.01)
    assert found.params == pytest.approx(sum(p.numel() for p in module.parameters()), rel=0.005)
    # The peak is a residual sum of the first stage: both branches and what becomes of them.
    assert found.activation_bytes == 3 * 4 * 256 * 56**2


def test_a_vit_s_costs_what_the_literature_says_at_every_size(exported):
    module, path = exported("vit_small_patch16_224", 224)
    found = cost.summarize(path)
    gmacs = {224: found.macs / 1e9}
    for side in VIT_S_16:
        _, shallow = exported("vit_small_patch16_224", side, img_size=side, depth=1)
        layers = cost.layers(shallow)
        outside = sum(layer.macs for layer in layers if layer.op == "Conv" or layer.shape[-1:] == (1000,))
        total = (12 * (sum(layer.macs for layer in layers) - outside) + outside) / 1e9  # twelve equal blocks
        assert gmacs.setdefault(side, total) == pytest.approx(total, rel=1e-6)

    assert gmacs == pytest.approx(VIT_S_16, rel=0.01)
    assert found.params == pytest.approx(sum(p.numel() for p in module.parameters()), rel=0.005)


def test_the_weights_of_a_quantized_layer_are_no_activations(tmp_path):
    import onnx_ir as ir

    from rdeploy.quantize import placement, qdq
    from rdeploy.types import QuantScheme

    graph = TEXT["write"](tmp_path / "m.onnx", "y = MatMul(x, w)", x=(1, 64), w=W(64, 1000))
    model = ir.load(graph)
    scheme = QuantScheme(name="s", activations="int8", ops=("MatMul",))
    qdq.insert(model, placement.place(model, scheme), {"x": (-1.0, 1.0)}, scheme)
    ir.save(model, tmp_path / "q.onnx")

    assert cost.summarize(tmp_path / "q.onnx").activation_bytes < 64 * 4 + 1000 * 4 + 200
