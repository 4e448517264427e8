"""`source_key` decides what the cache may reuse, `fingerprint` what the manifest calls the same model."""

import copy
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy import models  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.errors import ConfigError  # noqa: E402
from rdeploy.models.fingerprint import fingerprint  # noqa: E402

ARCH = LoadOptions(arch="timm:resnet18")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def test_the_key_of_a_file_follows_its_content_and_the_options(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(network().state_dict(), file)
    key = models.source_key(str(file), ARCH)

    assert models.source_key(str(file), ARCH) == key
    assert models.source_key(str(file), replace(ARCH, mean=(0.5,) * 3)) != key
    assert models.source_key(str(file), replace(ARCH, arch="timm:resnet34")) != key
    assert models.source_key(str(file), replace(ARCH, offline=True)) == key
    torch.save({"other": torch.zeros(3)}, file)
    assert models.source_key(str(file), ARCH) != key


def test_the_key_of_a_name_follows_the_installed_versions(monkeypatch):
    key = models.source_key("timm:resnet18", LoadOptions())
    assert key != models.source_key("timm:resnet34", LoadOptions())

    monkeypatch.setattr(models, "_version", lambda package: "0")

    assert models.source_key("timm:resnet18", LoadOptions()) != key


def test_code_of_the_user_has_no_key(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(network().state_dict(), file)

    assert models.source_key("package.module:factory", LoadOptions()) is None
    assert models.source_key(str(file), LoadOptions(arch="package.module:factory")) is None
    assert models.source_key(str(file), LoadOptions(arch="timm:resnet18", trust_pickle=True)) is None


def test_the_key_of_a_missing_file():
    with pytest.raises(ConfigError, match=r"gone\.pt does not exist"):
        models.source_key("gone.pt", LoadOptions())


def test_the_key_is_made_without_torch(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(network().state_dict(), file)
    code = """
        import sys
        from rdeploy import models
        from rdeploy.build_request import LoadOptions
        assert models.source_key(sys.argv[1], LoadOptions(arch="timm:resnet18"))
        assert models.source_key("timm:resnet18", LoadOptions())
        assert not {"torch", "timm", "torchvision", "onnx"} & set(sys.modules), sorted(sys.modules)
    """

    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(file)], check=True)


def test_equal_networks_have_equal_fingerprints():
    assert fingerprint(network()) == fingerprint(network())


def _change_weight(net):
    net[0].weight.data[0, 0, 0, 0] += 1


def _change_buffer(net):
    net[1].running_mean += 1


def _change_dtype(net):
    net.half()


def _change_setting(net):
    net[0].padding = (0, 0)


def _change_class(net):
    net[2] = nn.GELU()


@pytest.mark.parametrize("change", [_change_weight, _change_buffer, _change_dtype, _change_setting, _change_class])
def test_what_changes_the_function_changes_the_fingerprint(change):
    net = network()
    before = fingerprint(net)
    change(net)

    assert fingerprint(net) != before


def test_an_edited_forward_changes_the_fingerprint(tmp_path, monkeypatch):
    def fingerprint_of(body):
        (tmp_path / "edited_net.py").write_text(
            f"from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return {body}\n"
        )
        code = (
            "from edited_net import Net; from rdeploy.models.fingerprint import fingerprint; print(fingerprint(Net()))"
        )
        done = subprocess.run([sys.executable, "-B", "-c", code], check=True, capture_output=True, text=True, env=env)
        return done.stdout.strip()

    import os

    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    assert fingerprint_of("x + 1") == fingerprint_of("x + 1") != fingerprint_of("x + 2")


def test_a_class_without_a_file_counts_by_its_code():
    def make(body):
        namespace = {"nn": nn, "__name__": "interactive"}
        exec(f"class Net(nn.Module):\n    def forward(self, x):\n        return {body}\n", namespace)
        return namespace["Net"]()

    assert fingerprint(make("x + 1")) == fingerprint(make("x + 1")) != fingerprint(make("x * 3"))


def test_buffers_outside_the_state_dict_count():
    net = network()
    net.register_buffer("secret", torch.zeros(2), persistent=False)
    other = copy.deepcopy(net)
    other.secret += 1

    assert fingerprint(net) != fingerprint(other)
