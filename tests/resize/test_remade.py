"""Networks whose size is fixed when they are made, and those whose windows follow the image: their weights come along."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

from torch import nn  # noqa: E402

from rdeploy import models, resize  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.errors import Unsupported  # noqa: E402
from rdeploy.resize import _remade, _windows  # noqa: E402

FIXED = {
    "levit_128s": {"img_size": 128},
    "efficientformerv2_s0": {"img_size": 128},
    "nest_tiny": {"img_size": 128},
    "gcvit_xxtiny": {"img_size": 128},
    "hiera_tiny_224": {"img_size": 128},
    "botnet26t_256": {"img_size": 128},
    "coat_lite_tiny": {"img_size": 64},
}


def load(name, **kwargs):
    options = LoadOptions(random_init=True, offline=True, arch_kwargs=tuple({"num_classes": 5, **kwargs}.items()))
    loaded = models.load(f"timm:{name}", options)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    loaded.module.train().eval()  # forgets what was computed of the old weights
    return loaded.module, loaded.spec


@pytest.mark.parametrize("name", FIXED)
def test_the_weights_come_along(name):
    net, spec = load(name, **FIXED[name])
    images = torch.rand(2, 3, *spec.native_resolution)

    again = _remade.remade(net, spec.native_resolution)
    with torch.no_grad():
        assert torch.equal(again(images), net(images))

    (asked,) = resize.asked("input", spec.native_resolution, scale=0.75)
    place = resize.settle(net, spec, asked, None)
    smaller = resize.apply(net, spec, (place,))

    assert place.resolution < spec.native_resolution
    with torch.no_grad():
        assert smaller(torch.rand(2, 3, *place.resolution)).shape == (2, 5)
    weights, old = smaller.state_dict(), net.state_dict()
    same = [key for key in old if torch.equal(weights[key], old[key])]
    assert all(weights[key].shape != old[key].shape for key in set(old) - set(same))
    assert len(same) > 0.8 * len(old)


def test_tables_of_positions_are_resampled_by_timms_functions():
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table, resize_rel_pos_bias_table_levit

    table, grid = torch.rand(3, 49), torch.rand(1, 64, 8)
    windows = torch.rand(169, 2)
    found = {
        "a.attention_biases": (table, (3, 25), resize_rel_pos_bias_table_levit(table.T, (25, 3)).T),
        "a.relative_position_bias_table": (windows, (81, 2), resize_rel_pos_bias_table(windows, (5, 5), (81, 2))),
        "pos_embed": (grid, (1, 36, 8), resample_abs_pos_embed(grid, [6, 6], [8, 8], 0)),
        "a.height_rel": (torch.arange(31.0)[:, None], (31, 1), torch.arange(31.0)[:, None]),
    }

    for name, (old, shape, expected) in found.items():
        assert torch.equal(_remade._resampled(name, old, torch.Size(shape)), expected), name


def test_weights_that_belong_to_places_are_refused():
    net, spec = load("mixer_s32_224", img_size=64)

    with pytest.raises(
        Unsupported, match="24 of its weights belong to its own image size and have no meaning at another"
    ):
        resize.settle(net, spec, resize.Place(at="input", resolution=(32, 32)), None)


def test_tables_are_not_resampled_to_what_is_not_square():
    net, _ = load("levit_128s", img_size=128)

    with pytest.raises(Unsupported, match="for square images only, not 96x64"):
        _remade.remade(net, (96, 64))


def swin():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SwinConfig(
        image_size=112, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=7, num_labels=3
    )
    return transformers.SwinForImageClassification(config), 112


def maxvit():
    networks = pytest.importorskip("torchvision.models.maxvit", reason="torchvision is not installed")
    net = networks.MaxVit(
        input_size=(128, 128), stem_channels=8, partition_size=4, block_channels=[8, 8, 8, 8], block_layers=[1, 1, 1, 1],
        head_dim=4, stochastic_depth_prob=0.0, num_classes=3,
    )  # fmt: skip
    return net, 128


@pytest.mark.parametrize(("make", "side", "window"), [(swin, 48, 6), (maxvit, 96, 3)])
def test_windows_follow_the_image(make, side, window):
    torch.manual_seed(0)
    net, native = make()
    net = nn.Sequential(net.eval())
    part = next(inner for inner in net.modules() if _windows.is_windowed(inner))

    _windows.retarget_windows(part, (native, native))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _windows.retarget_windows(part, (side, side))

    tables = [name for name in before if name.endswith("relative_position_bias_table")]
    assert before.keys() == net.state_dict().keys()
    assert net.state_dict()[tables[-1]].shape[0] == (2 * window - 1) ** 2
    with torch.no_grad():
        answer = net(torch.rand(2, 3, side, side))
    assert getattr(answer, "logits", answer).shape == (2, 3)


def test_maxvits_windows_are_square():
    with pytest.raises(Unsupported, match="MaxVit takes square images of a multiple of 32 pixels, not 96x64"):
        _windows.retarget_windows(maxvit()[0], (96, 64))
