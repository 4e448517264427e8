"""timm and torchvision: names, configurations, weights that cannot be fetched."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

from rdeploy import models  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.errors import ConfigError, MissingDependency, Unsupported  # noqa: E402
from rdeploy.models import download  # noqa: E402

RANDOM = LoadOptions(random_init=True)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test may reach a hub, nor find weights that this machine happens to have cached."""
    monkeypatch.setattr(download, "_answers", lambda url: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_timm_takes_timms_own_configuration():
    spec = models.load("timm:mobilenetv3_small_050", RANDOM).spec

    config = timm.models.get_pretrained_cfg("mobilenetv3_small_050")
    assert spec.name == "mobilenetv3_small_050"
    assert spec.native_resolution == config.input_size[1:]
    assert spec.preprocessing.mean == config.mean
    assert spec.preprocessing.std == config.std
    assert spec.preprocessing.interpolation == config.interpolation
    assert spec.preprocessing.crop_pct == config.crop_pct
    assert spec.assumed == ()
    assert len(spec.labels) == 1000
    assert spec.labels[1].startswith("goldfish")


def test_timm_with_a_tag_keeps_that_tags_configuration():
    spec = models.load("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", RANDOM).spec

    assert spec.preprocessing.mean == (0.5, 0.5, 0.5)
    assert spec.name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_timm_arguments():
    options = LoadOptions(random_init=True, arch_kwargs=(("num_classes", 3), ("in_chans", 1)))

    loaded = models.load("timm:test_resnet.r160_in1k", options)

    assert loaded.spec.channels == 1
    assert loaded.spec.labels == ()
    assert len(loaded.spec.preprocessing.mean) == 1
    assert loaded.module(torch.zeros(2, 1, 64, 64)).shape == (2, 3)


def test_timm_image_size_is_the_native_one():
    options = LoadOptions(random_init=True, arch_kwargs=(("img_size", 64), ("depth", 1)))

    assert models.load("timm:vit_tiny_patch16_224", options).spec.native_resolution == (64, 64)


def test_timm_without_a_head_is_an_embedding():
    options = LoadOptions(random_init=True, arch_kwargs=(("num_classes", 0),))

    assert models.load("timm:test_resnet.r160_in1k", options).spec.task == "embedding"


def test_random_weights_are_seeded():
    def first(seed):
        loaded = models.load("timm:test_resnet.r160_in1k", LoadOptions(random_init=True, seed=seed))
        return loaded.spec.sha256

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet81", "timm has no model 'resnet81', did you mean 'resnet"),
        ("timm:resnet18.a1_in2k", "timm has no weights 'a1_in2k' for resnet18, did you mean 'a1_in1k'"),
        ("timm:hf-hub:someone/model", "timm has no model 'hf-hub:someone/model'"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81', did you mean 'resnet"),
    ],
)
def test_unknown_names(source, message):
    with pytest.raises(ConfigError, match=message):
        models.load(source, RANDOM)


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_arguments_that_an_architecture_does_not_take(family):
    options = LoadOptions(random_init=True, arch_kwargs=(("wings", 2),))

    with pytest.raises(ConfigError, match=rf"{family} cannot build resnet18.*wings") as caught:
        models.load(f"{family}:resnet18", options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["timm", "torchvision"])
@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_cannot_be_fetched(family, offline):
    with pytest.raises(ConfigError) as caught:
        models.load(f"{family}:resnet18", LoadOptions(offline=offline))

    host = "huggingface.co" if family == "timm" else "download.pytorch.org"
    why = "--offline is set" if offline else f"{host} cannot be reached"
    assert str(caught.value) == (
        f"the pretrained weights of {family}:resnet18 are not on this machine and {why}: "
        f"use --random-init, or a weights file with --arch {family}:resnet18"
    )


def test_the_hubs_switch_is_put_back(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(ConfigError):
        models.load("timm:resnet18", LoadOptions(offline=True))

    import os

    assert before == constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


def test_torchvision_weights_in_the_cache_need_no_network(monkeypatch, tmp_path):
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    state = torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / weights.url.rsplit("/", 1)[1]).write_bytes(b"cached")

    loaded = models.load("torchvision:shufflenet_v2_x0_5", LoadOptions(offline=True))

    assert torch.equal(loaded.module.fc.weight, state["fc.weight"])


def test_timm_without_pretrained_weights():
    name = next(n for n in timm.list_models("resnet*") if not timm.models.get_pretrained_cfg(n).has_weights)

    with pytest.raises(Unsupported, match=f"timm has no pretrained weights for {name}: use --random-init"):
        models.load(f"timm:{name}", LoadOptions())


def test_torchvision_takes_the_transforms_of_its_default_weights():
    spec = models.load("torchvision:mobilenet_v2", RANDOM).spec

    assert spec.native_resolution == (224, 224)
    assert spec.preprocessing.interpolation == "bilinear"
    assert int(224 / spec.preprocessing.crop_pct) == 232
    assert len(spec.labels) == 1000
    assert spec.labels[1] == "goldfish"
    assert spec.assumed == ()


def test_a_file_of_torchvisions_older_weights_takes_their_transforms(tmp_path):
    file = tmp_path / "mobilenet_v2-b0353104.pth"
    torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), file)

    spec = models.load(str(file), LoadOptions(arch="torchvision:mobilenet_v2")).spec

    assert int(224 / spec.preprocessing.crop_pct) == 256


def test_branches_are_folded_and_the_function_stays(monkeypatch):
    import timm

    torch.manual_seed(0)
    open_form = timm.create_model("repvgg_a0", pretrained=False).eval()
    for part in open_form.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: open_form)
    images = torch.rand(1, 3, 64, 64)

    folded = models.load("timm:repvgg_a0", LoadOptions(random_init=True)).module

    def branches(net):
        return sum(isinstance(part, torch.nn.Conv2d) for part in net.modules())

    with torch.no_grad():
        torch.testing.assert_close(folded(images), open_form(images), rtol=1e-3, atol=1e-3)
    assert branches(folded) < branches(open_form)


def test_torchvision_segmentation_is_unwrapped_and_fetches_no_backbone():
    loaded = models.load(
        "torchvision:lraspp_mobilenet_v3_large", LoadOptions(random_init=True, native_resolution=(64, 64))
    )

    assert loaded.spec.task == "segmentation"
    assert loaded.module(torch.zeros(1, 3, 64, 64)).shape == (1, 21, 64, 64)
    assert len(loaded.spec.labels) == 21


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "quantized_resnet18", "raft_small"])
def test_torchvision_networks_of_other_kinds(name):
    known = torchvision.models.list_models()
    source = next(n for n in known if n == name or n.startswith(name))

    with pytest.raises(Unsupported, match="is no floating-point classification or segmentation network"):
        models.load(f"torchvision:{source}", RANDOM)


@pytest.mark.parametrize(("family", "package"), [("timm", "timm"), ("torchvision", "torchvision")])
def test_without_the_zoo(monkeypatch, family, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(
        MissingDependency, match=rf"{package} is not installed; install it with: pip install 'rdeploy\[zoo"
    ):
        models.load(f"{family}:resnet18", RANDOM)


def test_reachability_is_asked_with_a_time_limit(monkeypatch):
    monkeypatch.undo()
    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr(download, "getproxies", dict)

    assert not download._answers("https://huggingface.co")
    assert asked == [(("huggingface.co", 443), download._CONNECT_S)]


def test_behind_a_proxy_the_proxy_decides(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(download, "getproxies", lambda: {"https": "http://proxy:3128"})

    assert download._answers("https://huggingface.co")
