"""Larger patches: the image keeps its size, the patch embedding is resampled as FlexiViT does."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

from torch import nn  # noqa: E402

from rdeploy.resize import patch  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

OPTIONS = patch.Options()
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}


def spec(native=(64, 64)):
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
    return ModelSpec(name="net", source="net", sha256="", native_resolution=native, preprocessing=preprocessing)


def vit(size=64, side=8, name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, patch_size=side, **(SMALL | kwargs)).eval()


def tokens(module, images):
    return module.patch_embed(images).shape[1]


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [((32, 32), (32, 32)), ((48, 48), (32, 32)), ((60, 60), (32, 32)), ((20, 20), (16, 16)), ((64, 64), (64, 64))],
)
def test_patches_are_snapped_to_what_divides_the_image(wanted, nearest):
    assert patch.snap(vit(), spec(), wanted, OPTIONS) == nearest


def test_the_choices_at_224():
    net = vit(224, 16)

    found = {patch.snap(net, spec((224, 224)), (side, side), OPTIONS)[0] for side in range(1, 224)}

    assert found == {16, 32, 64, 112, 128}  # patches of 224, 112, 56, 32, 28
    assert patch.fit(net, spec((224, 224)), (128, 128), OPTIONS, None) == patch.Options(patch=(28, 28))
    assert patch.said(patch.Options(patch=(28, 28))) == "the image is cut into patches of 28 pixels"


def test_the_embedding_and_the_positions_are_timms():
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    net = vit()
    before = copy.deepcopy(net.state_dict())

    reduced = patch.apply(net, spec(), (32, 16), OPTIONS)

    images = torch.rand(2, 3, 64, 64)
    assert tokens(reduced, images) == 4 * 2
    assert torch.equal(reduced.patch_embed.proj.weight, resample_patch_embed(net.patch_embed.proj.weight, [16, 32]))
    wanted = resample_abs_pos_embed(net.pos_embed, new_size=[4, 2], old_size=[8, 8], num_prefix_tokens=1)
    assert torch.equal(reduced.pos_embed, wanted)
    assert reduced(images).shape == (2, 5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_on_an_enlarged_image_the_larger_patches_see_what_the_small_ones_saw():
    net = vit(32, 8)
    larger = vit(64, 8)
    larger.load_state_dict(net.state_dict() | {"pos_embed": larger.pos_embed})
    image = torch.rand(1, 3, 32, 32)

    reduced = patch.apply(larger, spec(), (32, 32), OPTIONS)

    enlarged = nn.functional.interpolate(image, scale_factor=2, mode="bicubic", antialias=True)
    close = (reduced.patch_embed(enlarged) - net.patch_embed(image)).abs().max() / net.patch_embed(image).abs().max()
    assert close < 0.15  # exact inside a patch; the resize of a whole image also sees its neighbours


@pytest.mark.parametrize(
    "net",
    [
        lambda: vit(name="eva02_tiny_patch14_224"),
        lambda: vit(class_token=False, global_pool="avg"),
        lambda: nn.Sequential(vit(), nn.Softmax(dim=1)),
    ],
    ids=["rotary positions", "no class token", "inside a wrapper"],
)
def test_other_transformers(net):
    module = net()

    assert patch.unsupported(module, spec(), (32, 32), OPTIONS) is None
    with torch.no_grad():
        assert patch.apply(module, spec(), (32, 32), OPTIONS)(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_torchvisions_vision_transformer():
    transformers = pytest.importorskip("torchvision.models.vision_transformer", reason="torchvision is not installed")
    net = transformers.VisionTransformer(64, 8, 1, 2, 16, 32, num_classes=5).eval()
    nn.init.normal_(net.encoder.pos_embedding)

    reduced = patch.apply(net, spec(), (32, 32), OPTIONS)

    assert reduced.encoder.pos_embedding.shape == (1, 1 + 16, 16)
    assert torch.equal(reduced.encoder.pos_embedding[:, :1], net.encoder.pos_embedding[:, :1])
    with torch.no_grad():
        assert reduced(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    assert net.patch_size == 8
    assert patch.unsupported(net, spec(), (32, 16), OPTIONS) == "torchvision's transformers take square patches only"


def test_half_precision_stays():
    reduced = patch.apply(vit().to(torch.bfloat16), spec(), (32, 32), OPTIONS)

    assert {p.dtype for p in reduced.parameters()} == {torch.bfloat16}


def test_what_has_no_patches_or_no_such_size_is_refused_in_plain_words():
    cnn = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())

    assert patch.unsupported(cnn, spec(), (32, 32), OPTIONS) == (
        "Sequential cuts its image into no patches that could be larger: reduce it at its input"
    )
    assert patch.snap(cnn, spec(), (30, 30), OPTIONS) == (30, 30)
    assert patch.unsupported(vit(), spec(), (48, 48), OPTIONS) == (
        "patches must divide the image: 64 pixels can have patches of 16, 32, 64"
    )


def test_a_network_that_refuses_says_so():
    net = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1), embed_dim=24, num_classes=5
    ).eval()
    net.set_input_size = lambda img_size=None, patch_size=None: (_ for _ in ()).throw(ValueError("no such window"))

    said = patch.unsupported(net, spec((56, 56)), (28, 28), OPTIONS)

    assert said == "SwinTransformer cannot take patches of 8: no such window"
