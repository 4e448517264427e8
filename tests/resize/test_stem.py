"""Reducing the resolution behind the first convolution or a named module, and the anti-aliased downscale that does it."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from rdeploy.errors import ConfigError, Unsupported  # noqa: E402
from rdeploy.models.answers import Take  # noqa: E402
from rdeploy.resize import _insert, after, stem  # noqa: E402
from rdeploy.resize._downscale import Downscale, low_pass  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

OPTIONS = stem.Options()


def spec(native=(32, 32), channels=3):
    preprocessing = Preprocessing(mean=(0.5,) * channels, std=(0.5,) * channels)
    return ModelSpec(
        name="net", source="net", sha256="", native_resolution=native, preprocessing=preprocessing, channels=channels
    )


def timm_model(name, **kwargs):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


class Net(nn.Module):
    """Two convolutions whose names and order of definition do not tell which is first."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, 2, 1)
        self.second, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.table = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(4, 5)
        self.register_buffer("grid", torch.ones(1, 1, 2, 2))
        self.sizes = []

    def forward(self, images):
        shift = self.table(self.grid).mean()  # runs before every other convolution, and does not see the image
        features = torch.relu(self.norm(self.second(images)))
        self.sizes.append(tuple(features.shape[2:]))
        return self.head(self.first(features).mean((2, 3))) + shift


def places(module):
    return [name for name, inner in module.named_modules() if isinstance(inner, _insert.Downscaled)]


@pytest.mark.parametrize("factor", [1.0, 1.2, 4 / 3, 1.75, 2.0, 2.6, 3.0, 4.5])
def test_the_low_pass_sums_to_one_and_has_the_missing_variance(factor):
    taps = low_pass(factor)

    steps = torch.arange(len(taps)) - len(taps) // 2
    assert float(taps.sum()) == pytest.approx(1)
    assert float((taps * steps**2).sum()) == pytest.approx((factor**2 - 1) / 6, abs=1e-6)
    assert torch.equal(taps, taps.flip(0))


def test_by_a_whole_factor_it_is_area_interpolation():
    features = torch.rand(2, 3, 12, 8)

    reduced = Downscale(3, (12, 8), (4, 4))(features)

    assert torch.allclose(reduced, functional.interpolate(features, size=(4, 4), mode="area"), atol=1e-6)


@pytest.mark.parametrize("target", [(9, 6), (5, 7), (12, 5), (11, 8)])
def test_it_is_near_pytorchs_antialiased_resize_on_a_smooth_map_and_keeps_a_constant(target):
    downscale = Downscale(2, (12, 8), target)
    rows, columns = torch.linspace(0, 3, 12)[:, None], torch.linspace(0, 2, 8)
    smooth = torch.stack([torch.sin(rows + columns), rows * columns])[None]

    wanted = functional.interpolate(smooth, size=target, mode="bilinear", antialias=True)
    assert (downscale(smooth) - wanted).abs().max() < 0.03 * wanted.abs().max()
    assert torch.allclose(downscale(torch.full((1, 2, 12, 8), 3.0)), torch.tensor(3.0))


def test_a_pattern_that_the_new_grid_cannot_hold_is_averaged_out():
    stripes = torch.ones(1, 1, 16, 16)
    stripes[..., ::2] = -1

    reduced = Downscale(1, (16, 16), (9, 9))(stripes)

    plain = functional.interpolate(stripes, size=(9, 9), mode="bilinear")
    assert reduced.pow(2).mean() < 0.2 * plain.pow(2).mean()


def test_the_first_convolution_is_found_by_what_flows_and_everything_behind_it_is_smaller():
    net = Net().eval()
    before = copy.deepcopy(net.state_dict())

    assert stem.snap(net, spec(), (24, 24), OPTIONS) == (24, 24)
    assert stem.unsupported(net, spec(), (24, 24), OPTIONS) is None
    reduced = stem.apply(net, spec(), (24, 16), OPTIONS)

    reduced.sizes.clear()
    assert places(reduced) == ["second"]
    assert reduced(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert reduced.sizes == [(12, 8)]
    assert places(net) == []
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Reached(nn.Module):
    """A network that reaches its first convolution in its own way."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.stem, self.layers, self.way = self.conv, [self.conv], way

    def forward(self, images):
        ways = {
            "by its second name": lambda: self.stem(images),
            "by keyword": lambda: self.conv(input=images),
            "by a list": lambda: self.layers[0](images),
        }
        features = ways[self.way]()
        self.side = features.shape[-1]
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize("way", ["by its second name", "by keyword"])
def test_a_convolution_is_replaced_wherever_the_network_reaches_it(way):
    reduced = stem.apply(Reached(way).eval(), spec(), (16, 16), OPTIONS)

    reduced(torch.zeros(1, 3, 32, 32))

    assert reduced.side == 8


def test_a_convolution_that_cannot_be_replaced_is_refused():
    said = stem.unsupported(Reached("by a list").eval(), spec(), (16, 16), OPTIONS)

    assert (
        said
        == "behind conv: the network does not reach this module by its name, so that nothing can be put in its place"
    )


def test_it_computes_the_network_with_the_map_reduced_by_hand():
    net = Net().eval()
    images = torch.rand(2, 3, 32, 32)

    reduced = stem.apply(net, spec(), (16, 16), OPTIONS)

    features = functional.avg_pool2d(net.second(images), 2)
    wanted = net.head(net.first(torch.relu(net.norm(features))).mean((2, 3))) + net.table(net.grid).mean()
    assert torch.allclose(reduced(images), wanted, atol=1e-6)


def test_a_size_between_pixels_is_snapped_to_what_the_map_can_have():
    net = Net().eval()

    assert stem.snap(net, spec(), (25, 23), OPTIONS) == (24, 24)
    assert stem.snap(net, spec(), (1, 1), OPTIONS) == (2, 2)


def test_an_odd_map_at_its_own_size_is_left_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

    assert stem.snap(net, spec((33, 33)), (33, 33), OPTIONS) == (33, 33)
    assert stem.snap(net, spec((33, 33)), (32, 32), OPTIONS) == (33, 33)


@pytest.mark.parametrize(
    ("name", "place"),
    [("resnet18", "conv1"), ("resnet18d", "conv1.0"), ("mobileone_s0", "stem"), ("convnext_atto", "stem.0")],
)
def test_timm_networks(name, place):
    net = timm_model(name)

    reduced = stem.apply(net, spec((64, 64)), (48, 48), OPTIONS)

    assert places(reduced) == [place]
    with torch.no_grad():
        assert reduced(torch.rand(2, 3, 64, 64)).shape == (2, 1000)


def test_attributes_of_the_convolution_are_still_there():
    reduced = stem.apply(timm_model("resnet18"), spec((64, 64)), (48, 48), OPTIONS)

    assert reduced.conv1.stride == (2, 2)
    assert reduced.conv1.weight.shape == (64, 3, 7, 7)
    with pytest.raises(AttributeError, match="nonsense"):
        reduced.conv1.nonsense  # noqa: B018


def test_half_precision_stays():
    net = Net().eval().to(torch.bfloat16)

    reduced = stem.apply(net, spec(), (24, 24), OPTIONS)

    assert reduced(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_positions_behind_a_convolutional_stem_are_resampled():
    net = timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1)
    net.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 192, 3, 2, 1))
    size = stem.snap(net, spec(), (18, 18), OPTIONS)

    reduced = stem.apply(net, spec(), size, OPTIONS)

    assert size == (16, 16)  # the nearest whole number of patches
    assert places(reduced) == ["patch_embed.proj.0"]
    assert (net.pos_embed.shape[1], reduced.pos_embed.shape[1]) == (65, 17)
    with torch.no_grad():
        assert reduced(torch.rand(2, 3, 32, 32)).shape == (2, 1000)


class Placed(nn.Module):
    """A stem that adds positions itself, and a transformer behind it."""

    def __init__(self, early):
        super().__init__()
        self.vit = timm_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1)
        self.vit.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 192, 3, 2, 1))
        self.early = early

    def forward(self, images):
        if self.early:
            images = images + self.vit.pos_embed.mean()
        return self.vit(images)


@pytest.mark.parametrize("early", [False, True])
def test_positions_that_are_read_before_the_place_stay_what_they_are(early):
    said = stem.unsupported(Placed(early).eval(), spec(), (16, 16), OPTIONS)

    assert (said is not None) == early


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_transformer_that_starts_with_patches_is_refused_with_the_way_out(name):
    net = timm_model(name, **({"depth": 1} if name.startswith("vit") else {"depths": (2, 1, 1, 1), "embed_dim": 24}))

    said = stem.unsupported(net, spec((224, 224)), (168, 168), OPTIONS)

    assert said == (
        "its first convolution (patch_embed.proj) cuts the image into patches, which a transformer cannot have fewer of: "
        "use --at patch, --at tokens or --at input"
    )


def test_what_has_no_place_is_refused_in_plain_words():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).eval()
    fixed = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 32 * 32, 5)).eval()
    graph = torch.export.export(Net().eval(), (torch.zeros(1, 3, 32, 32),)).module()
    scripted = torch.jit.trace(Net().eval(), torch.zeros(1, 3, 32, 32))

    assert stem.unsupported(flat, spec(), (24, 24), OPTIONS) == (
        "it has no convolution that sees the image: reduce it at its input"
    )
    reason = str(stem.unsupported(fixed, spec(), (24, 24), OPTIONS))
    assert reason.startswith("behind 0: what comes after it cannot take a smaller map: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in reason
    assert str(stem.unsupported(graph, spec(), (24, 24), OPTIONS)).startswith("a graph of torch.export has no modules")
    assert str(stem.unsupported(scripted, spec(), (24, 24), OPTIONS)).startswith("a TorchScript archive has no modules")
    assert stem.snap(scripted, spec(), (24, 24), OPTIONS) == (24, 24)
    assert stem.unsupported(Net().eval(), spec(), (48, 48), OPTIONS) == (
        "48 is larger than the 32 that the network sees"
    )


def test_an_output_that_changes_its_length_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.Flatten()).eval()

    assert stem.unsupported(net, spec(), (16, 16), OPTIONS) == (
        "behind 0: its output becomes (1, 128) instead of (1, 512)"
    )


def test_after_a_named_module():
    net = timm_model("resnet18")

    reduced = after.apply(net, spec((64, 64)), (48, 48), after.Options(module="layer1.1"))

    assert places(reduced) == ["layer1.1"]
    assert after.snap(net, spec((64, 64)), (50, 50), after.Options(module="layer1")) == (48, 48)
    with torch.no_grad():
        assert reduced(torch.rand(2, 3, 64, 64)).shape == (2, 1000)


def test_a_module_is_named_as_the_users_network_names_it():
    class Answers(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), nn.Conv2d(4, 2, 1)

        def forward(self, images):
            return {"out": self.head(self.backbone(images))}

    net = Take(Answers(), ("out",)).eval()

    for name in ("backbone.0", "module.backbone.0"):
        reduced = after.apply(net, spec(), (16, 16), after.Options(module=name))
        assert places(reduced) == ["module.backbone.0"]
    with pytest.raises(ConfigError, match="after:backbon: Answers has no such module, did you mean 'backbone'"):
        after.snap(net, spec(), (16, 16), after.Options(module="backbon"))


def test_after_a_module_that_is_not_there():
    net = Net().eval()

    with pytest.raises(
        ConfigError, match="after:secund: Net has no such module, did you mean 'second'.; outermost: first"
    ):
        after.snap(net, spec(), (24, 24), after.Options(module="secund"))


def test_after_a_module_without_a_feature_map():
    net = Net().eval()

    with pytest.raises(Unsupported, match=r"the output of head is of shape \(1, 5\), which is no feature map"):
        after.apply(net, spec(), (24, 24), after.Options(module="head"))
    unused = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    unused.spare = nn.Module()
    unused.forward = lambda images: unused[0](images).mean((2, 3))
    assert after.unsupported(unused, spec(), (24, 24), after.Options(module="1")) == "1 is not executed"


def test_training_reaches_the_weights_through_the_downscale():
    reduced = stem.apply(Net(), spec(), (24, 24), OPTIONS)

    reduced.train()
    reduced(torch.rand(2, 3, 32, 32)).sum().backward()

    assert reduced.second.weight.grad.abs().sum() > 0
    assert not [name for name, _ in reduced.named_parameters() if "kernel" in name]
