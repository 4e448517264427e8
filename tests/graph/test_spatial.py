"""Graphs that were exported for one image size, re-sized: equal to the same network made for the new size, or refused."""

import runpy
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'rdeploy[torch]'")
import onnx_ir as ir  # noqa: E402

from rdeploy import export  # noqa: E402
from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.graph import simplify, spatial  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parents[1] / "onnx_text.py"))
W = TEXT["normal"]


def ints(*values):
    return np.array(values, np.int64)


def resized(tmp_path, body, size, *, x=(1, 3, 8, 8), **facts):
    """Return the path of a graph for images of `x`, re-sized to `size`."""
    model = ir.from_proto(TEXT["model"](body, x=x, **facts))
    simplify.simplify(model, opset=18)
    spatial.resize(model, size)
    ir.save(model, tmp_path / "new.onnx")
    onnx.checker.check_model(str(tmp_path / "new.onnx"), full_check=True)
    return tmp_path / "new.onnx"


def image(h, w, seed=0):
    return np.random.default_rng(seed).random((1, 3, h, w), np.float32)


# Each body is made for 8x8; with the constants for 6x4 in their place it is made for 6x4.
FROZEN = {
    "a flatten behind a pooling": ("g = GlobalAveragePool(x) y = Reshape(g, s)", {"s": ints(1, 3)}, {"s": ints(1, 3)}),
    "channels in groups": (
        "r = Reshape(x, s) t = Transpose<perm=[0,2,1,3,4]>(r) y = Reshape(t, u)",
        {"s": ints(1, 3, 1, 8, 8), "u": ints(1, 3, 8, 8)},
        {"s": ints(1, 3, 1, 6, 4), "u": ints(1, 3, 6, 4)},
    ),
    "a map as tokens and back": (
        "r = Reshape(x, s) t = Softmax(r) y = Reshape(t, u)",
        {"s": ints(1, 3, 64), "u": ints(1, 3, 8, 8)},
        {"s": ints(1, 3, 24), "u": ints(1, 3, 6, 4)},
    ),
    "an output at the image's size": (
        'c = Conv<strides=[2,2]>(x, w) y = Resize<mode="linear">(c, , , s)',
        {"w": W(2, 3, 2, 2), "s": ints(1, 2, 8, 8)},
        {"w": W(2, 3, 2, 2), "s": ints(1, 2, 6, 4)},
    ),
    "an output at the image's size, by a factor": (
        'c = Conv<strides=[2,2],pads=[1,1,1,1]>(x, w) y = Resize<mode="linear">(c, , f)',
        {"w": W(2, 3, 4, 4), "f": np.array([1, 1, 2, 2], np.float32)},
        {"w": W(2, 3, 4, 4), "f": np.array([1, 1, 2, 2], np.float32)},
    ),
    "a skip connection": (
        'a = Conv<strides=[2,2]>(x, w) b = Conv<strides=[2,2]>(a, v) r = Resize<mode="nearest">(b, , , s) y = Add(a, r)',
        {"w": W(3, 3, 2, 2), "v": W(3, 3, 1, 1), "s": ints(1, 3, 4, 4)},
        {"w": W(3, 3, 2, 2), "v": W(3, 3, 1, 1), "s": ints(1, 3, 3, 2)},
    ),
    "a pooled context spread over the map": (
        "g = GlobalAveragePool(x) e = Expand(g, s) y = Add(e, x)",
        {"s": ints(1, 3, 8, 8)},
        {"s": ints(1, 3, 6, 4)},
    ),
    "a pooling over the whole map": ("y = AveragePool<kernel_shape=[8,8]>(x)", {}, {}),
    "all rows, by their numbers": (
        "y = Gather<axis=2>(x, i)",
        {"i": ints(*range(8))},
        {"i": ints(*range(6))},
    ),
    "the last row": ("g = Gather<axis=2>(x, i) y = Relu(g)", {"i": ints(-1)}, {"i": ints(-1)}),
    "a pooled context, repeated over the map": (
        "g = GlobalAveragePool(x) t = Tile(g, r) y = Add(t, x)",
        {"r": ints(1, 1, 8, 8)},
        {"r": ints(1, 1, 6, 4)},
    ),
    "pixels that become channels": (
        "r = Reshape(x, s) t = Transpose<perm=[0,1,3,5,2,4]>(r) y = Reshape(t, u)",
        {"s": ints(1, 3, 4, 2, 4, 2), "u": ints(1, 12, 4, 4)},
        {"s": ints(1, 3, 3, 2, 2, 2), "u": ints(1, 12, 3, 2)},
    ),
    "all but the border": (
        "y = Slice(x, a, b, c)",
        {"a": ints(1, 1), "b": ints(8, -1), "c": ints(2, 3)},
        {"a": ints(1, 1), "b": ints(6, -1), "c": ints(2, 3)},
    ),
    "every other pixel": (
        "y = Slice(x, a, b, c, d)",
        {"a": ints(1), "b": ints(2**62), "c": ints(3), "d": ints(2)},
        {"a": ints(1), "b": ints(2**62), "c": ints(3), "d": ints(2)},
    ),
    "the whole of a slice": (
        "y = Slice(x, a, b, c)",
        {"a": ints(0), "b": ints(8), "c": ints(2)},
        {"a": ints(0), "b": ints(6), "c": ints(2)},
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_froze_the_size_is_written_anew(name, tmp_path):
    body, constants, wanted = FROZEN[name]

    path = resized(tmp_path, body, (6, 4), **constants)

    new_body = body.replace("[8,8]", "[6,4]")
    TEXT["write"](tmp_path / "wanted.onnx", new_body, x=(1, 3, 6, 4), **wanted)
    pixels = image(6, 4)
    np.testing.assert_allclose(
        TEXT["run"](path, pixels), TEXT["run"](tmp_path / "wanted.onnx", pixels), rtol=1e-5, atol=1e-6
    )


def test_an_output_at_the_images_size_follows_it_also_where_the_map_stays_the_same(tmp_path):
    body = 'c = Conv<strides=[4,4]>(x, w) y = Resize<mode="linear">(c, , , s)'

    path = resized(tmp_path, body, (7, 5), x=(1, 3, 8, 8), w=W(2, 3, 1, 1), s=ints(1, 2, 8, 8))

    assert TEXT["run"](path, image(7, 5)).shape == (1, 2, 7, 5)


def test_padding_by_tensorflows_rule_is_computed_again_and_other_padding_is_not(tmp_path):
    same = "c = Conv<strides=[2,2],pads=[0,0,1,1]>(x, w) y = Conv<strides=[2,2],pads=[0,0,1,1]>(c, v)"
    plain = "c = Conv<strides=[2,2],pads=[1,1,1,1]>(x, w) y = Conv<strides=[2,2],pads=[1,1,1,1]>(c, v)"
    weights = {"w": W(4, 3, 3, 3), "v": W(4, 4, 3, 3)}

    def pads(body):
        path = resized(tmp_path, body, (6, 5), **weights)
        return [list(node.attributes["pads"].as_ints()) for node in ir.load(path).graph]

    # 6 -> 3 -> 2 and 5 -> 3 -> 2: one pixel for an even side, two for an odd one
    assert pads(same) == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert pads(plain) == [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_bins_of_an_adaptive_pooling_keep_their_number(tmp_path):
    body = "y = AveragePool<kernel_shape=[6,6],strides=[6,6]>(x)"

    path = resized(tmp_path, body, (8, 10), x=(1, 3, 12, 12))

    assert TEXT["run"](path, image(8, 10)).shape == (1, 3, 2, 2)
    with pytest.raises(Unsupported, match="layer 'y' pools a map into 2x2 parts, which do not divide 9x10"):
        resized(tmp_path, body, (9, 10), x=(1, 3, 12, 12))


REFUSED = {
    "weights behind a flatten": (
        "f = Flatten(x) y = MatMul(f, w)",
        {"w": W(192, 5)},
        "layer 'y' has weights for 192 numbers, a flattened feature map of the old size: only a model that pools",
    ),
    "positions": (
        "r = Reshape(x, s) t = Transpose<perm=[0,2,1]>(r) y = Add(t, p)",
        {"s": ints(1, 3, 64), "p": W(1, 64, 3)},
        "layer 'y' holds a table of 1x64x3 for 1x64x3: a number for each place at the old size (positions, anchors); give",
    ),
    "windows": (
        "y = Reshape(x, s)",
        {"s": ints(1, 3, 2, 4, 2, 4)},
        "layer 'y' splits 1x3x8x8 into 1x3x2x4x2x4: windows or patches that fit the old size only",
    ),
    "a crop": (
        "y = Slice(x, a, b, c)",
        {"a": ints(0), "b": ints(5), "c": ints(2)},
        "layer 'y' cuts pixels 0 to 5 out of the 8 of its map: a part that fits the old size only",
    ),
    "the second half": (
        "y = Slice(x, a, b, c)",
        {"a": ints(4), "b": ints(8), "c": ints(2)},
        "layer 'y' cuts pixels 4 to 8 out of the 8 of its map: a part that fits the old size only",
    ),
    "the last half, from the end": (
        "y = Slice(x, a, b, c)",
        {"a": ints(-4), "b": ints(2**62), "c": ints(2)},
        "layer 'y' cuts pixels -4 to ",
    ),
    "rows by their numbers": (
        "y = Gather<axis=2>(x, i)",
        {"i": ints(0, 2, 4)},
        "layer 'y' picks pixels of its map by their numbers: they fit the old size only",
    ),
    "a fixed grid": (
        "y = GridSample(x, g)",
        {"g": np.zeros((1, 8, 8, 2), np.float32)},
        "layer 'y' samples its map on a fixed grid: it fits the old size only",
    ),
    "a norm with weights for each pixel": (
        "y = LayerNormalization<axis=1>(x, s, b)",
        {"s": W(3, 8, 8), "b": W(3, 8, 8)},
        "layer 'y' holds a table of 3x8x8 for 1x3x8x8: a number for each place at the old size",
    ),
    "slopes for each pixel": (
        "y = PRelu(x, s)",
        {"s": W(3, 8, 8)},
        "layer 'y' holds a table of 3x8x8 for 1x3x8x8: a number for each place at the old size",
    ),
    "a split": (
        "y, z = Split<axis=2>(x, p)",
        {"p": ints(3, 5)},
        "layer 'y' splits its map into parts of fixed size",
    ),
    "an output that grows with the image": (
        "y = Flatten(x)",
        {},
        "at 6x4 its output is 72 numbers instead of 192: it flattens the feature map without pooling",
    ),
    "two maps that no longer fit": (
        'a = Conv<strides=[2,2]>(x, w) b = Conv<strides=[2,2]>(a, w) r = Resize<mode="nearest">(b, , f) y = Add(a, r)',
        {"w": W(3, 3, 1, 1), "f": np.array([1, 1, 2, 2], np.float32)},
        "layer 'y' (Add) cannot take the map that 6x4 gives it: Incompatible dimensions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_tied_to_the_size_is_refused_in_plain_words(name, tmp_path):
    body, constants, message = REFUSED[name]

    with pytest.raises(Unsupported) as caught:
        resized(tmp_path, body, (6, 4), **constants)

    assert str(caught.value).startswith(message)


def _dense(kind):
    """torchvision's segmentation networks as one output, the FCN on a small backbone."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    from torch import nn
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation import fcn

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "lraspp":
                self.net = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
            else:
                self.net = fcn.FCN(IntermediateLayerGetter(models.resnet18(), {"layer4": "out"}), fcn.FCNHead(512, 5))

        def forward(self, images):
            return self.net(images)["out"]

    return Dense()


def _timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "dynamo"),
    [
        (_timm, "resnet18", False),
        (_timm, "tf_efficientnet_lite0", True),
        (_dense, "lraspp", False),
        (_dense, "fcn", True),
    ],
)
def test_an_exported_network_equals_the_module_at_the_new_size(make, name, dynamo, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    module = make(name).eval()
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.1, 0.1)
    given, example = tmp_path / "given.onnx", (torch.zeros(1, 3, 64, 64),)
    with export._quiet():
        torch.onnx.export(module, example, str(given), dynamo=dynamo, opset_version=18 if dynamo else 17)

    for size in ((48, 48), (75, 53)):
        model = export.prepare(given, size, tmp_path / "new.onnx")

        (wanted,) = export.torch_outputs(module, [image(*size)])
        export.check_parity(wanted, TEXT["run"](model.path, image(*size)), tolerance=1e-4)
