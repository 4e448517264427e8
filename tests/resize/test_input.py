"""Reducing the resolution at the input, on networks of every construction, small and with random weights."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy import resize  # noqa: E402
from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.resize import input as at_input  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

OPTIONS = at_input.Options()


def spec(native=(64, 64), channels=3):
    preprocessing = Preprocessing(mean=(0.5,) * channels, std=(0.5,) * channels)
    return ModelSpec(
        name="net", source="net", sha256="", native_resolution=native, preprocessing=preprocessing, channels=channels
    )


def timm_model(name, **kwargs):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def run(module, size, channels=3):
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    with torch.no_grad():
        return module(torch.rand(2, channels, *size).to(dtype))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()


def test_a_cnn_is_a_copy_of_itself():
    net = cnn()

    resized = at_input.apply(net, spec(), (48, 40), OPTIONS)

    assert resized is not net
    assert resized[0].weight.data_ptr() != net[0].weight.data_ptr()
    images = torch.rand(2, 3, 48, 40)
    assert torch.equal(resized(images), net(images))


def test_a_cnn_takes_any_size_with_one_forward():
    net, calls = cnn(), []
    net.register_forward_hook(lambda *_: calls.append(1))

    assert at_input.snap(net, spec(), (37, 53)) == (37, 53)
    assert len(calls) == 1
    assert at_input.unsupported(net, spec(), (37, 53)) is None


VITS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
    "vit without class token": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 1, "class_token": False, "global_pool": "avg"},
    ),
    "vit with registers": (
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 1, "reg_tokens": 4, "no_embed_class": True},
    ),
    "deit with distillation token": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1}),
    "beit with relative positions": (
        "beit_base_patch16_224",
        {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 3},
    ),
    "eva with rotary positions": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1}),
    "cait, whose class has no resizing": ("cait_xxs24_224", {"img_size": 64, "depth": 1}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (2, 1, 1, 1), "embed_dim": 24}),
    "swin v2": ("swinv2_tiny_window8_256", {"img_size": 128, "depths": (2, 1, 1, 1), "embed_dim": 24}),
}


@pytest.mark.parametrize("name", VITS)
def test_vision_transformers_run_at_other_sizes(name):
    arch, kwargs = VITS[name]
    net = timm_model(arch, **kwargs)
    native = (kwargs["img_size"],) * 2
    before = {key: value.clone() for key, value in net.state_dict().items()}
    patch = net.patch_embed.patch_size[0]
    wanted = (native[0] - 2 * patch, native[1] + patch)

    assert at_input.unsupported(net, spec(native), wanted) is None
    assert at_input.snap(net, spec(native), wanted) == wanted
    resized = at_input.apply(net, spec(native), wanted, OPTIONS)

    assert run(resized, wanted).shape == run(net, native).shape
    assert torch.isfinite(run(resized, wanted)).all()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    run(net, native)


@pytest.mark.parametrize("name", ["vit", "deit with distillation token", "vit with registers"])
def test_prefix_tokens_are_kept_and_positions_resampled_as_timm_does(name):
    from timm.layers import resample_abs_pos_embed

    arch, kwargs = VITS[name]
    net = timm_model(arch, **kwargs)
    prefix = 0 if getattr(net, "no_embed_class", False) else net.num_prefix_tokens

    resized = at_input.apply(net, spec(), (32, 48), OPTIONS)

    assert resized.pos_embed.shape[1] == prefix + 2 * 3
    assert torch.equal(resized.pos_embed[:, :prefix], net.pos_embed[:, :prefix])
    expected = resample_abs_pos_embed(net.pos_embed, new_size=[2, 3], old_size=[4, 4], num_prefix_tokens=prefix)
    assert torch.equal(resized.pos_embed, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_half_precision_stays(name, dtype):
    arch, kwargs = VITS[name]
    net = timm_model(arch, **kwargs).to(dtype)
    native = (kwargs["img_size"],) * 2
    wanted = (native[0] // 2, native[1] // 2)

    resized = at_input.apply(net, spec(native), wanted, OPTIONS)

    floating = [t for t in (*resized.parameters(), *resized.buffers()) if t.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {dtype}
    assert run(resized, wanted).dtype == dtype


def test_a_vision_transformer_inside_a_wrapper():
    net = nn.Sequential(timm_model("vit_tiny_patch16_224", img_size=64, depth=1), nn.Softmax(dim=1)).eval()

    resized = at_input.apply(net, spec(), (48, 48), OPTIONS)

    assert run(resized, (48, 48)).shape == (2, 1000)


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [((48, 48), (48, 48)), ((50, 60), (48, 64)), ((56, 56), (48, 48)), ((57, 55), (64, 48)), ((3, 3), (16, 16))],
)
def test_a_size_between_patches_is_snapped_to_the_nearest(wanted, nearest):
    net = timm_model("vit_tiny_patch16_224", img_size=64, depth=1)

    assert at_input.snap(net, spec(), wanted) == nearest
    if wanted != nearest:
        said = at_input.unsupported(net, spec(), wanted)
        assert said is not None
        assert said.startswith("its patches are 16 pixels: ")
        with pytest.raises(Unsupported, match="its patches are 16 pixels"):
            at_input.apply(net, spec(), wanted, OPTIONS)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "tf_efficientnet_lite0"])
def test_timm_cnns(name):
    net = timm_model(name)

    assert at_input.snap(net, spec((224, 224)), (72, 96)) == (72, 96)
    assert at_input.unsupported(net, spec((224, 224)), (72, 96)) is None
    assert run(at_input.apply(net, spec((224, 224)), (72, 96), OPTIONS), (72, 96)).shape == (2, 1000)


@pytest.mark.parametrize("wanted", [(48, 48), (32, 80)])
def test_torchvisions_vision_transformer(wanted):
    transformers = pytest.importorskip("torchvision.models.vision_transformer", reason="torchvision is not installed")
    net = transformers.VisionTransformer(64, 16, 1, 2, 16, 32).eval()
    with torch.no_grad():
        net.encoder.pos_embedding.normal_()
        net.heads.head.weight.normal_()

    resized = at_input.apply(net, spec(), wanted, OPTIONS)
    again = at_input.apply(resized, spec(wanted), (64, 64), OPTIONS)

    assert run(resized, wanted).shape == (2, 1000)
    assert run(net, (64, 64)).shape == run(again, (64, 64)).shape
    assert torch.equal(resized.encoder.pos_embedding[:, :1], net.encoder.pos_embedding[:, :1])
    assert at_input.snap(net, spec(), (50, 70)) == (48, 64)
    copied = copy.deepcopy(resized)
    image = torch.rand(1, 3, *wanted)
    with torch.no_grad():
        assert torch.equal(copied(image), resized(image))


def test_torchvisions_square_sizes_follow_its_own_interpolation():
    transformers = pytest.importorskip("torchvision.models.vision_transformer", reason="torchvision is not installed")
    net = transformers.VisionTransformer(64, 16, 1, 2, 16, 32).eval()

    resized = at_input.apply(net, spec(), (48, 48), OPTIONS)

    expected = transformers.interpolate_embeddings(48, 16, copy.deepcopy(net.state_dict()))["encoder.pos_embedding"]
    assert torch.equal(resized.encoder.pos_embedding, expected)


def test_a_network_of_a_fixed_size_is_snapped_to_its_own():
    net = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.Flatten(), nn.Linear(2 * 8 * 8, 5)).eval()

    assert at_input.snap(net, spec(), (48, 48)) == (64, 64)
    said = at_input.unsupported(net, spec(), (48, 48))
    assert said is not None
    assert said.startswith("Sequential cannot take 48: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in said


def test_a_network_that_needs_a_multiple_of_32():
    class Strict(nn.Module):
        def forward(self, images):
            if images.shape[2] % 32 or images.shape[3] % 32:
                raise ValueError("needs a multiple of 32")
            return images.mean((2, 3))

    net = Strict().eval()

    assert at_input.snap(net, spec((224, 224)), (168, 168)) == (160, 160)
    assert at_input.snap(net, spec((224, 224)), (150, 210)) == (160, 224)
    assert at_input.unsupported(net, spec((224, 224)), (168, 168)) == "Strict cannot take 168: needs a multiple of 32"


def test_a_batch_that_silently_grows_is_noticed():
    class Viewing(nn.Module):
        def forward(self, images):
            return nn.functional.avg_pool2d(images, 32).reshape(-1, 3)

    said = at_input.unsupported(Viewing().eval(), spec((32, 32)), (64, 64))

    assert said == "at 64 it gives another number of answers than images: its size is baked in"
    assert at_input.snap(Viewing().eval(), spec((32, 32)), (64, 64)) == (56, 56)


def test_an_output_that_changes_its_length_is_noticed():
    net = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.Flatten()).eval()

    said = at_input.unsupported(net, spec(), (32, 32))

    assert said == "at 32 its output is 32 numbers instead of 128: it flattens the feature map without pooling"


def test_a_dense_output_may_change_its_size():
    net = nn.Conv2d(3, 2, 3, padding=1).eval()

    assert at_input.unsupported(net, spec(), (32, 48)) is None


def test_a_graph_exported_at_one_size():
    net = torch.export.export(cnn(), (torch.zeros(1, 3, 64, 64),)).module()

    assert at_input.snap(net, spec(), (48, 48)) == (64, 64)
    assert at_input.unsupported(net, spec(), (64, 64)) is None
    said = at_input.unsupported(net, spec(), (48, 48))
    assert said is not None
    assert said.startswith("it was exported for images of 64 only: export it with dynamic height and width")
    with pytest.raises(Unsupported, match="exported for images of 64 only"):
        at_input.apply(net, spec(), (48, 48), OPTIONS)


def test_a_graph_exported_with_dynamic_sizes():
    auto = torch.export.Dim.AUTO
    program = torch.export.export(cnn(), (torch.zeros(2, 3, 64, 64),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))

    assert at_input.snap(program.module(), spec(), (48, 40)) == (48, 40)


def test_no_pixels():
    assert at_input.unsupported(cnn(), spec(), (0, 10)) == "a resolution of 0x10 has no pixels"


def test_mode_and_gradients_are_left_alone():
    net = timm_model("vit_tiny_patch16_224", img_size=64, depth=1)

    resized = at_input.apply(net, spec(), (48, 48), OPTIONS)

    assert not resized.training
    assert resized.pos_embed.requires_grad
    assert resized.pos_embed.is_leaf


@pytest.mark.parametrize("kind", ["flattens", "exported"])
def test_a_network_that_takes_only_its_own_size_is_refused_with_the_reason(kind):
    flattens = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.Flatten(), nn.Linear(2 * 8 * 8, 5)).eval()
    net = flattens if kind == "flattens" else torch.export.export(cnn(), (torch.zeros(1, 3, 64, 64),)).module()
    reasons = {
        "flattens": "Sequential cannot take 48: ",
        "exported": "it was exported for images of 64 only: export it",
    }

    with pytest.raises(Unsupported) as caught:
        resize.settle(net, spec(), resize.Place(at="input", resolution=(48, 48)), None)

    nearest = "nothing would be reduced at input: the size nearest to 48 that this model takes is its own, 64: "
    assert str(caught.value).startswith(nearest + reasons[kind])


def test_a_smaller_size_never_becomes_a_larger_one():
    class Large(nn.Module):
        def forward(self, images):
            if images.shape[2] % 80:
                raise ValueError("needs a height of 80")
            return images.mean((2, 3))

    assert at_input.snap(Large().eval(), spec(), (60, 20)) == (64, 64)
    assert at_input.snap(Large().eval(), spec(), (70, 20))[0] == 64
    assert at_input.snap(Large().eval(), spec(), (82, 20))[0] == 80
