import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy.adapt import batchnorm  # noqa: E402

from .conftest import blobs, network, subject  # noqa: E402


def test_the_statistics_of_a_known_distribution_are_found_to_the_last_digits():
    module = nn.Sequential(nn.BatchNorm2d(3)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    values = (pixels.astype(np.float64) / 255 - 0.5) / 0.25

    found = batchnorm.estimate(module, pixels, subject(network(), network()))

    flat = values.reshape(-1, 3)
    assert found["0.running_mean"].numpy() == pytest.approx(flat.mean(axis=0), abs=1e-6)
    assert found["0.running_var"].numpy() == pytest.approx(flat.var(axis=0, ddof=1), rel=1e-5)


def test_a_layer_behind_another_is_fed_normalised_activations():
    module = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, affine=False)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)

    found = batchnorm.estimate(module, pixels, subject(network(), network()))

    assert found["1.running_mean"].numpy() == pytest.approx(np.zeros(3), abs=1e-5)
    assert found["1.running_var"].numpy() == pytest.approx(np.ones(3), abs=1e-3)


def test_the_module_is_left_as_it_was():
    module = network().eval()
    before = copy.deepcopy(module.state_dict())

    batchnorm.estimate(module, blobs(40)[0], subject(network(), network()))

    assert not module[1].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_mixture_is_linear_and_its_ends_are_exact(weight):
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    found = {"a": torch.tensor([3.0, 7.0])}

    mixed = batchnorm.mixed(before, found, weight)

    assert mixed.keys() == {"a"}
    assert torch.equal(mixed["a"], torch.tensor([1.0 + 2 * weight, 2.0 + 5 * weight]))


def test_statistics_that_do_not_fit_are_put_right(trained):
    broken = copy.deepcopy(trained)
    broken[1].running_mean += 0.5
    broken[1].running_var *= 4

    change = batchnorm.apply(subject(broken, trained), batchnorm.Options())

    assert change is not None
    assert change.detail == "1 of the statistics of 64 images"
    assert change.preprocessing is None
    fixed = copy.deepcopy(broken)
    fixed.load_state_dict(change.state)
    assert torch.allclose(fixed[1].running_mean, trained[1].running_mean, atol=0.2)
    assert torch.equal(fixed[0].weight, trained[0].weight)


def test_nothing_is_proposed_where_the_old_statistics_do_best(trained):
    options = batchnorm.Options(weights=())

    assert batchnorm.apply(subject(trained, trained), options) is None


@pytest.mark.parametrize(
    ("module", "task", "reason"),
    [
        (None, "classification", "an ONNX file's BatchNorm is folded into its weights"),
        (nn.Flatten(), "classification", "the network has no BatchNorm"),
        (nn.BatchNorm2d(3), "detection", "a detector's boxes are put right in the exported graph only"),
    ],
)
def test_it_says_why_there_is_nothing_to_estimate(module, task, reason, trained):
    import dataclasses

    one = subject(trained, trained)
    one = dataclasses.replace(one, module=module, spec=dataclasses.replace(one.spec, task=task))

    assert batchnorm.unsupported(one, batchnorm.Options()) == reason
