"""transformers' plain vision transformers with larger patches and merged tokens."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
pytest.importorskip("timm", reason="timm is not installed (extra: zoo)")

from timm.layers import resample_patch_embed  # noqa: E402

from rdeploy import resize  # noqa: E402
from rdeploy.models.answers import Take  # noqa: E402
from rdeploy.models.hf import Vision  # noqa: E402
from rdeploy.resize import _merging, _transformers_vit, patch, tokens  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

SPEC = ModelSpec(
    name="net",
    source="net",
    sha256="",
    native_resolution=(64, 64),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
)
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip
KINDS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {"num_labels": 5}, "logits"),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}, "pooler_output"),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 12}, "image_embeds"),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, "pooler_output"),
}


@pytest.fixture(params=KINDS)
def net(request):
    network, config, more, key = KINDS[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, network)(getattr(transformers, config)(**SMALL, **more)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vision = Vision(model, interpolates=request.param != "dinov2", flips=False)
    return Take(vision, (key,)).eval()


def blocks_of(net):
    return tokens._blocks(tokens._find(net))


def test_a_block_is_its_two_branches(net):
    block, sequence = blocks_of(net)[0], torch.randn(2, 9, 32)

    with torch.no_grad():
        attended, keys = _merging.attend(block, sequence, None)
        between = sequence + attended
        found = between + _merging.perceive(block, between)
        wanted = block(sequence, None)

    torch.testing.assert_close(found, wanted)
    assert keys.shape == (2, 9, 16)


@pytest.mark.parametrize("at", ["patch", "tokens", "input@0.75+tokens@0.75", "patch@0.5+tokens@0.75"])
def test_it_is_reduced_there(net, at):
    places, given = (), SPEC
    for place in resize.asked(at, (64, 64), scale=0.5):
        places += (resize.settle(resize.apply(net, SPEC, places), given, place, None),)
        given = resize.after_place(given, places[-1])
    reduced, images = resize.apply(net, SPEC, places), torch.rand(2, 3, *given.native_resolution)

    with torch.no_grad():
        native, found = net(torch.rand(2, 3, 64, 64)), reduced(images)

    assert found.shape == native.shape
    assert not torch.equal(found[0], found[1])
    assert multiplications(reduced, images) < 0.9 * multiplications(net, torch.rand(2, 3, 64, 64))
    torch.export.export(reduced, (images,))


def multiplications(module, images):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    return counter.get_total_flops()


def test_patches_are_resampled_by_their_pseudo_inverse_and_the_network_is_left_alone(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    larger = patch.apply(net, SPEC, (32, 32), patch.Options())

    (old, name), (new, _) = (_transformers_vit._projection(patch._find(one)) for one in (net, larger))
    assert torch.equal(getattr(new, name).weight, resample_patch_embed(getattr(old, name).weight, [16, 16]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert [place.shape for place in larger.parameters()] != [place.shape for place in net.parameters()]


def test_merging_equal_tokens_changes_little(net):
    """One colour: all patches differ by their positions alone, which are equal here."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "position" in name:
                parameter.zero_()
        image = torch.full((1, 3, 64, 64), 0.3)
        merged = tokens.apply(net, SPEC, (48, 48), tokens.Options())

        torch.testing.assert_close(merged(image), net(image), rtol=1e-3, atol=1e-4)


def test_what_is_refused_names_the_network():
    config = transformers.ResNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], embedding_size=8)
    module = Take(Vision(transformers.ResNetModel(config), interpolates=False, flips=False), ("pooler_output",))

    assert patch.unsupported(module, SPEC, (32, 32), patch.Options()).startswith(
        "ResNetModel cuts its image into no patches"
    )
    assert tokens.unsupported(module, SPEC, (32, 32), tokens.Options()).startswith(
        "ResNetModel is no plain vision transformer"
    )
