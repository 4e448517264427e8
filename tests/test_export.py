"""From PyTorch, TorchScript and ONNX to the one FP32 graph; parity on real photographs."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'rdeploy[torch]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'rdeploy[torch]'")

import onnx  # noqa: E402
from torch import nn  # noqa: E402

from rdeploy import export  # noqa: E402
from rdeploy.errors import InvariantError, StageError, Unsupported  # noqa: E402
from rdeploy.types import ModelSpec, OnnxModel, Preprocessing, TensorInfo  # noqa: E402

TEXT = runpy.run_path(str(Path(__file__).parent / "onnx_text.py"))
SPEC = ModelSpec(
    name="net",
    source="test",
    sha256="",
    native_resolution=(32, 32),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3),
)


class Net(nn.Module):
    """Convolution, BatchNorm, residual, pooling, classifier, with statistics that are not those of a new network."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 5)
        for norm in (self.norm, self.second):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.second(self.depthwise(x))
        return self.classifier(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def photographs(side, *, height=None):
    """Return photographs as a network sees them, each (1, 3, height or side, side)."""
    data = pytest.importorskip("skimage.data", reason="the photographs are scikit-image's: pip install scikit-image")
    from PIL import Image

    pixels = []
    for photograph in (data.astronaut(), data.coffee(), data.chelsea()):
        resized = Image.fromarray(photograph).resize((side, height or side), Image.Resampling.BICUBIC)
        pixels.append(((np.asarray(resized, np.float32) / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None])
    return pixels


def parity(module, model, images):
    exported = np.concatenate([TEXT["run"](model.path, image) for image in images])
    return export.check_parity(export.torch_outputs(module, images)[0], exported)


def ops(model):
    return [node.op_type for node in onnx.load(model.path).graph.node]


def test_a_small_cnn_is_the_same_function_on_photographs(tmp_path):
    module = net()

    model = export.export(module, SPEC, (32, 32), tmp_path / "new" / "model.onnx")

    export.check_graph(model)
    assert parity(module, model, photographs(32)) < 1e-5
    assert (model.precision, model.opset) == ("fp32", 18)
    assert model.inputs == (TensorInfo(name="input", dtype="float32", shape=(1, 3, 32, 32)),)
    assert model.outputs == (TensorInfo(name="output", dtype="float32", shape=(1, 5)),)


def test_batch_norm_is_folded_and_everything_lies_in_one_file(tmp_path):
    model = export.export(net(), SPEC, (32, 32), tmp_path / "model.onnx")

    assert not {"BatchNormalization", "ReduceMean", "Constant", "Identity"} & set(ops(model))
    assert ops(model).count("Conv") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("opset", [17, 18, 19, 20])
def test_every_opset_that_a_target_may_ask_for(opset, tmp_path):
    module = net()

    model = export.export(module, SPEC, (32, 32), tmp_path / "model.onnx", opset=opset)

    export.check_graph(model)
    assert model.opset == opset
    assert parity(module, model, photographs(32)) < 1e-5


def test_a_resolution_need_not_be_square(tmp_path):
    module = net()

    model = export.export(module, SPEC, (24, 40), tmp_path / "model.onnx")

    assert model.inputs[0].shape == (1, 3, 24, 40)
    assert parity(module, model, photographs(40, height=24)) < 1e-5


def test_a_dynamic_batch_runs_at_every_size(tmp_path):
    module, image = net(), photographs(32)[0]

    model = export.export(module, SPEC, (32, 32), tmp_path / "model.onnx", dynamic_batch=True)

    assert model.inputs[0].shape == (-1, 3, 32, 32)
    assert model.outputs[0].shape == (-1, 5)
    for size in (1, 2, 5):
        batch = np.concatenate([image * (i + 1) for i in range(size)])
        (exact,) = export.torch_outputs(module, [batch])
        assert export.check_parity(exact, TEXT["run"](model.path, batch)) < 1e-5


def test_a_batch_that_is_not_dynamic_is_one(tmp_path):
    model = export.export(net(), SPEC, (32, 32), tmp_path / "model.onnx")

    with pytest.raises(Exception, match="Got: 2 Expected: 1"):
        TEXT["run"](model.path, np.concatenate(photographs(32)[:2]))


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_torchscript_module(dynamic_batch, tmp_path):
    module, images = net(), photographs(32)
    scripted = torch.jit.freeze(torch.jit.trace(module, torch.zeros(1, 3, 32, 32)))

    model = export.export(scripted, SPEC, (32, 32), tmp_path / "model.onnx", dynamic_batch=dynamic_batch)

    export.check_graph(model)
    assert parity(module, model, images) < 1e-5
    assert "BatchNormalization" not in ops(model)
    if dynamic_batch:
        batch = np.concatenate(images)
        assert export.check_parity(export.torch_outputs(module, images)[0], TEXT["run"](model.path, batch)) < 1e-5


@pytest.mark.parametrize("side", [64, 48])
def test_a_vision_transformer_at_two_resolutions(side, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'rdeploy[zoo]'")
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=side, depth=2, pretrained=False).eval()

    model = export.export(module, SPEC, (side, side), tmp_path / "model.onnx", opset=17)

    export.check_graph(model)
    assert parity(module, model, photographs(side)) < 1e-4
    assert ops(model).count("LayerNormalization") == 2 * 2 + 1
    assert not {"Pow", "Sqrt", "ReduceMean", "Shape"} & set(ops(model))


class Several(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.net, self.shape = net(), shape

    def forward(self, x):
        scores = self.net(x)
        return {"tuple": (scores, x), "list": [(scores,), x], "dict": {"scores": scores, "images": x}}[self.shape]


@pytest.mark.parametrize("shape", ["tuple", "list", "dict"])
def test_several_outputs_keep_their_order(shape, tmp_path):
    module = Several(shape)

    model = export.export(module, SPEC, (32, 32), tmp_path / "model.onnx")

    export.check_graph(model)
    assert model.outputs[0] == TensorInfo(name="output", dtype="float32", shape=(1, 5))
    assert model.outputs[1] == TensorInfo(name="output1", dtype="float32", shape=(1, 3, 32, 32))
    assert [rows.shape for rows in export.torch_outputs(module, photographs(32))] == [(3, 5), (3, 3, 32, 32)]
    assert parity(module, model, photographs(32)) < 1e-5


class Branches(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Fused(nn.Module):
    """Attention of 5 dimensions, as in Hiera: PyTorch's exporter has no fused form of it."""

    def __init__(self):
        super().__init__()
        self.fused_attn = True

    def forward(self, x):
        q = x.unflatten(3, (4, 8)).permute(0, 3, 1, 2, 4)
        if self.fused_attn:
            found = nn.functional.scaled_dot_product_attention(q, q, q)
        else:
            found = (q @ q.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ q
        return found.mean((1, 3, 4))


def test_attention_that_the_exporter_does_not_know_is_written_out(tmp_path):
    module = Fused().eval()

    model = export.export(module, SPEC, (32, 32), tmp_path / "model.onnx")

    assert parity(module, model, photographs(32)) < 1e-5
    assert module.fused_attn is True


class Chooses(nn.Module):
    def forward(self, x):
        return x[:, :, x[0, 0, 0] > 0].flatten(1)


def test_an_output_whose_shape_depends_on_the_image_is_refused(tmp_path):
    model = export.export(Chooses(), SPEC, (32, 32), tmp_path / "model.onnx")

    with pytest.raises(Unsupported, match=r"shape of the output output depends on the image, by the operator NonZero"):
        export.check_graph(model)


class Fourier(nn.Module):
    """A filter in the frequency domain, as in GFNet and the Scattering ViT."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 17, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        filtered = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(filtered, s=x.shape[-2:], norm="ortho").mean((2, 3))


def test_a_network_with_a_fourier_transform_computes_what_pytorch_does(tmp_path):
    module = Fourier()

    try:
        model = export.export(module, SPEC, (32, 32), tmp_path / "model.onnx")
    except StageError as error:
        if "Only one dimension is supported" not in str(error):
            raise
        pytest.skip(f"said in one sentence on this PyTorch: {error}")

    export.check_graph(model)
    try:
        found = parity(module, model, photographs(32))
    except Exception as error:
        if "is_onesided and inverse" not in str(error):
            raise
        pytest.skip(f"this ONNX Runtime has no inverse of a real DFT: {error}")
    assert found < 1e-4


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_any_number_of_channels(channels, tmp_path):
    module = nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spec = replace(SPEC, channels=channels)

    model = export.export(module, spec, (32, 32), tmp_path / "model.onnx")

    image = np.random.default_rng(0).standard_normal((1, channels, 32, 32)).astype(np.float32)
    assert model.inputs[0].shape == (1, channels, 32, 32)
    assert parity(module, model, [image]) < 1e-5


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError(f"the input must be 224, not {x.shape[-1]}\nand a second line")


@pytest.mark.parametrize(
    ("module", "cause"),
    [(Raises(), "RuntimeError: the input must be 224, not 32")],
)
def test_a_module_that_cannot_be_exported_is_a_failed_stage_in_one_line(module, cause, tmp_path):
    with pytest.raises(StageError) as caught:
        export.export(module.eval(), SPEC, (32, 32), tmp_path / "model.onnx")

    message = str(caught.value)
    assert message.startswith("export: PyTorch's exporter stopped: ")
    assert cause in message
    assert "\n" not in message
    assert len(message) < 700
    assert not list(tmp_path.iterdir())


def test_a_module_that_decides_by_the_image_is_refused_with_the_line(tmp_path, capfd):
    with pytest.raises(Unsupported) as caught:
        export.export(Branches().eval(), SPEC, (32, 32), tmp_path / "model.onnx")

    message = str(caught.value)
    assert re.match(r"it decides by the values of the image \(test_export\.py:\d+: return x\.mean", message)
    assert "an engine computes the same for every image" in message
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_exporter_says_nothing_on_the_terminal(tmp_path, capfd):
    export.export(net(), SPEC, (32, 32), tmp_path / "model.onnx")

    assert tuple(capfd.readouterr()) == ("", "")


def test_exporting_leaves_the_module_alone(tmp_path):
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    export.export(module, SPEC, (32, 32), tmp_path / "model.onnx")

    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


CONV = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) p = GlobalAveragePool(r) y = Flatten(p)"
W = TEXT["normal"]


def onnx_file(folder, *, x=(1, 3, 32, 32), body=CONV, **facts):
    return TEXT["write"](folder / "given.onnx", body, x=x, **{"w": W(4, 3, 3, 3), **facts})


@pytest.mark.parametrize("x", [(1, 3, 32, 32), ("n", 3, "h", "w"), ("n", 3, 32, "w"), ("n", "c", "h", "w")])
def test_an_onnx_file_is_bound_to_the_resolution(x, tmp_path):
    path, image = onnx_file(tmp_path, x=x), photographs(32)[0]

    model = export.prepare(path, (32, 32), tmp_path / "model.onnx")

    export.check_graph(model)
    assert model.inputs[0].shape == (1, 3, 32, 32)
    assert model.outputs[0].shape == (1, 4)
    np.testing.assert_allclose(TEXT["run"](model.path, image), TEXT["run"](path, image), rtol=1e-5)


def test_an_onnx_file_with_a_dynamic_batch(tmp_path):
    path, batch = onnx_file(tmp_path, x=("n", 3, "h", "w")), np.concatenate(photographs(32))

    model = export.prepare(path, (32, 32), tmp_path / "model.onnx", dynamic_batch=True)

    assert model.inputs[0].shape == (-1, 3, 32, 32)
    np.testing.assert_allclose(TEXT["run"](model.path, batch), TEXT["run"](path, batch), rtol=1e-5)


@pytest.mark.parametrize("x", [(1, 3, 64, 64), ("n", 3, 64, 72), ("n", 3, 64, "w")])
def test_an_onnx_file_of_a_fixed_size_is_resized(x, tmp_path):
    path, images = onnx_file(tmp_path, x=x), photographs(40, height=48)

    model = export.prepare(path, (48, 40), tmp_path / "model.onnx")

    dynamic = onnx_file(tmp_path, x=("n", 3, "h", "w"))
    assert model.inputs[0].shape == (1, 3, 48, 40)
    np.testing.assert_allclose(TEXT["run"](model.path, images[0]), TEXT["run"](dynamic, images[0]), rtol=1e-5)


def test_an_onnx_file_that_is_tied_to_its_size_is_refused_at_another(tmp_path):
    weights = np.ones((3 * 8 * 8, 2), np.float32)
    path = TEXT["write"](tmp_path / "given.onnx", "f = Flatten(x) y = MatMul(f, w)", x=(1, 3, 8, 8), w=weights)

    with pytest.raises(Unsupported, match=r"given.onnx has a fixed input of 8: layer 'y' has weights for 192 numbers"):
        export.prepare(path, (6, 6), tmp_path / "model.onnx")

    assert not (tmp_path / "model.onnx").exists()


def test_an_onnx_file_that_takes_no_image_is_refused(tmp_path):
    path = TEXT["write"](tmp_path / "given.onnx", "y = Relu(x)", x=(1, 8))

    with pytest.raises(Unsupported) as caught:
        export.prepare(path, (32, 32), tmp_path / "model.onnx")

    assert str(caught.value) == "given.onnx: expected one image input (N, C, H, W), found x (1, 8)"


def test_an_onnx_file_with_two_inputs_is_refused(tmp_path):
    given = TEXT["model"]("y = Relu(x)", x=(1, 3, 32, 32))
    given.graph.input.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [1, "n"]))
    onnx.save(given, tmp_path / "given.onnx")

    with pytest.raises(Unsupported, match=r"expected one image input .*, found x \(1, 3, 32, 32\), mask \(1, n\)$"):
        export.prepare(tmp_path / "given.onnx", (32, 32), tmp_path / "model.onnx")


def test_weights_that_an_old_file_lists_as_inputs_are_no_inputs(tmp_path):
    given = TEXT["model"](CONV, x=(1, 3, 32, 32), w=W(4, 3, 3, 3))
    given.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4, 3, 3, 3]))
    onnx.save(given, tmp_path / "given.onnx")

    model = export.prepare(tmp_path / "given.onnx", (32, 32), tmp_path / "model.onnx")

    assert [info.name for info in model.inputs] == ["x"]


def test_an_onnx_file_with_an_operator_of_its_own_is_refused(tmp_path):
    path = onnx_file(tmp_path, body="c = Conv(x, w) y = my.ops.Swish(c)", domains=("my.ops",), check=False)

    with pytest.raises(Unsupported, match="layer 'y' is my.ops::Swish, which is outside ONNX's operators"):
        export.prepare(path, (32, 32), tmp_path / "model.onnx")


def test_parity_is_relative_to_the_largest_output():
    exact = np.array([[1.0, -200.0]], np.float32)

    assert export.check_parity(exact, exact + np.float32(0.1)) == pytest.approx(0.1 / 200, rel=1e-3)
    assert export.check_parity(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)) == 0


@pytest.mark.parametrize("other", [[[1.0, 1.5]], [[1.0, np.nan]], [[1.0, np.inf]]])
def test_a_graph_that_computes_something_else_fails(other):
    with pytest.raises(
        StageError, match=r"export: the graph differs from the PyTorch model by \S+ of its largest output"
    ):
        export.check_parity(np.array([[1.0, 2.0]], np.float32), np.array(other, np.float32))


def test_a_graph_whose_output_has_another_shape_fails():
    with pytest.raises(StageError, match=r"export: the graph returns \(1, 3\), the PyTorch model \(1, 2\)"):
        export.check_parity(np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32))


def test_a_graph_that_is_not_valid_is_found(tmp_path):
    broken = TEXT["model"](CONV, x=(1, 3, 32, 32), w=W(4, 3, 3, 3))
    del broken.graph.initializer[:]
    onnx.save(broken, tmp_path / "broken.onnx")

    with pytest.raises(InvariantError, match="export: the graph is not valid ONNX: ") as caught:
        export.check_graph(export.describe(tmp_path / "broken.onnx", precision="fp32"))
    assert "\n" not in str(caught.value)


def test_a_graph_with_two_inputs_or_no_output_is_found(tmp_path):
    path = onnx_file(tmp_path)
    image = TensorInfo(name="x", dtype="float32", shape=(1, 3, 32, 32))
    model = OnnxModel(path=str(path), sha256="", precision="fp32", opset=18, inputs=(image, image), outputs=(image,))

    with pytest.raises(InvariantError, match="export: expected one input and an output, found 2 and 1"):
        export.check_graph(model)


def test_nothing_is_in_the_file_that_nobody_reads(tmp_path):
    import onnx_ir as ir

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    spec = ModelSpec(
        name="net", source="net", sha256="", native_resolution=(16, 16),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
    )  # fmt: skip

    made = export.export(net, spec, (16, 16), tmp_path / "m.onnx")

    assert [name for name, value in ir.load(made.path).graph.initializers.items() if not value.uses()] == []


def test_a_model_that_one_onnx_file_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_BYTES", 1000)

    with pytest.raises(Unsupported, match=r"the weights take 0\.0 GB in FP32; an ONNX file holds at most"):
        export.export(net(), SPEC, (32, 32), tmp_path / "m.onnx")

    assert not list(tmp_path.iterdir())


def test_weights_that_lie_beside_an_onnx_file_end_up_in_the_one_file(tmp_path):
    source = TEXT["write"](tmp_path / "source.onnx", "y = Conv(x, w)", w=TEXT["normal"](4, 3, 3, 3))
    outside = tmp_path / "beside"
    outside.mkdir()
    onnx.save(
        onnx.load(str(source)), str(outside / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0
    )

    export.prepare(outside / "m.onnx", (8, 8), tmp_path / "out" / "model.onnx")

    assert (outside / "m.data").stat().st_size > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    image = TEXT["normal"](1, 3, 8, 8)
    np.testing.assert_allclose(
        TEXT["run"](tmp_path / "out" / "model.onnx", image), TEXT["run"](source, image), rtol=1e-6
    )
