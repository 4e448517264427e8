"""What every resize method must do; a new file in rdeploy/resize/ is picked up by itself."""

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy import plugins, resize  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

METHODS = plugins.names("rdeploy.resize")
NATIVE = (64, 64)
SPEC = ModelSpec(
    name="net",
    source="net",
    sha256="",
    native_resolution=NATIVE,
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
)


def cnn():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def vit():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=3, embed_dim=24, num_heads=2, num_classes=5
    ).eval()


def options_of(method):
    given = {"module": "0"} if "module" in {field.name for field in dataclasses.fields(method.Options)} else {}
    return method.Options(**given)


def settled(method, name, module):
    """Return the place where the method reduces the module by half; skip where it says that it cannot."""
    at = f"{name}:0" if "module" in {field.name for field in dataclasses.fields(method.Options)} else name
    return resize.settle(module, SPEC, resize.Place(at=at, resolution=(32, 32)), None)


def takes(method, module):
    try:
        return method.unsupported(
            module, SPEC, method.snap(module, SPEC, (32, 32), options_of(method)), options_of(method)
        )
    except resize.ConfigError as error:  # `after` a module that this network does not have
        return str(error)


@pytest.fixture(params=METHODS)
def method(request):
    return resize.find(request.param)


@pytest.fixture(params=[cnn, vit], ids=["cnn", "vit"])
def module(request):
    torch.manual_seed(0)
    return request.param()


def test_it_defines_what_the_protocol_lists_and_says_what_it_does(method):
    for name in ("Options", "unsupported", "snap", "apply"):
        assert callable(getattr(method, name)), name
    assert dataclasses.is_dataclass(method.Options)
    assert method.Options.__dataclass_params__.frozen
    assert hasattr(method, "fit") == hasattr(method, "said")
    assert method.__doc__


def test_it_takes_at_least_one_of_the_two_kinds_of_network(method):
    assert None in (takes(method, cnn()), takes(method, vit()))


def test_it_refuses_in_one_sentence_or_returns_a_smaller_new_module(method, module):
    name = method.__name__.rpartition(".")[2]
    reason = takes(method, module)
    if reason is not None:
        assert "\n" not in reason
        assert len(reason) > 20
        return
    before = copy.deepcopy(module.state_dict())
    images = torch.rand(2, 3, *NATIVE)

    place = settled(method, name, module)
    reduced = resize.apply(module, SPEC, (place,))

    given = resize.after_place(SPEC, place).native_resolution
    with torch.no_grad():
        output = reduced(torch.rand(2, 3, *given))
        assert output.shape == module(images).shape
        assert torch.isfinite(output).all()
    assert reduced is not module
    assert not {p.data_ptr() for p in reduced.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert multiplications(reduced, given) < 0.8 * multiplications(module, NATIVE)


def multiplications(module, size):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, *size))
    return counter.get_total_flops()


def test_what_is_settled_is_settled(method, module):
    if takes(method, module) is not None:
        pytest.skip("refused")
    once = settled(method, method.__name__.rpartition(".")[2], module)

    assert resize.settle(module, SPEC, once, None) == once
    assert resize.said(once) is None or len(resize.said(once)) > 10
