"""Every form of MODEL, small; what is wrong with one is said in a line."""

import textwrap
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


from rdeploy import models  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.errors import ConfigError, MissingDependency, Unsupported  # noqa: E402

FACTORY = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self, classes=5, channels=3):
            super().__init__()
            self.conv = nn.Conv2d(channels, 4, 3, stride=2)
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(4, classes)

        def forward(self, images):
            return self.head(self.norm(self.conv(images)).relu().mean((2, 3)))

    def tiny(classes=5, channels=3):
        return Tiny(classes, channels)

    def configured(channels=3):
        net = Tiny(channels=channels)
        net.pretrained_cfg = {"input_size": (3, 40, 48), "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1),
                              "interpolation": "bilinear", "crop_pct": 1.0, "label_names": tuple("abcde")}
        return net

    class Dense(nn.Module):
        def forward(self, images):
            return {"out": images[:, :2] * 1.0, "aux": images}

    class Pair(nn.Module):
        def forward(self, images):
            return images, "words"

    class Boxes(nn.Module):
        def forward(self, images):
            return [{"boxes": images[0, 0, :, :4], "scores": images[0, 0, 0]}]

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.output_names = ()

        def forward(self, images):
            return {"boxes": images[:, 0, :, :4], "logits": images.mean((2, 3)), "scores": images[:, 0]}

    def broken():
        raise ValueError("no\\nweights here")

    def nothing():
        return {"not": "a module"}

    class Demanding(nn.Module):
        def forward(self, images):
            if images.shape[-1] != 32:
                raise RuntimeError("wants 32")
            return images.mean((2, 3))

    constant = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Be in a folder with a module of factories of a name that no other test imported."""
    monkeypatch.chdir(tmp_path)
    name = "factories_" + "".join(c for c in tmp_path.name if c.isalnum())
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORY))
    return name


def build(here, factory="tiny", **kwargs):
    return models.load(f"{here}:{factory}", LoadOptions(arch_kwargs=tuple(kwargs.items()))).module


OPTIONS = LoadOptions()
SMALL = LoadOptions(native_resolution=(32, 32))


def test_a_factory_in_the_current_directory(here):
    loaded = models.load(f"{here}:tiny", SMALL)

    assert loaded.onnx is None
    assert not loaded.module.training
    assert loaded.spec.name == "tiny"
    assert loaded.spec.task == "classification"
    assert loaded.spec.native_resolution == (32, 32)
    assert loaded.spec.preprocessing.mean == (0.485, 0.456, 0.406)
    assert loaded.spec.assumed == ("mean", "std", "interpolation", "crop_pct")


def test_a_factorys_own_configuration(here):
    spec = models.load(f"{here}:configured", OPTIONS).spec

    assert spec.native_resolution == (40, 48)
    assert spec.preprocessing.mean == (0.1, 0.2, 0.3)
    assert spec.preprocessing.interpolation == "bilinear"
    assert spec.preprocessing.crop_pct == 1.0
    assert spec.labels == ("a", "b", "c", "d", "e")
    assert spec.assumed == ()


def test_options_override_what_the_model_says(here):
    options = LoadOptions(mean=(0.5,), std=(0.25,), interpolation="lanczos", crop_pct=0.9, native_resolution=(24, 24))

    spec = models.load(f"{here}:configured", options).spec

    assert spec.preprocessing.mean == (0.5, 0.5, 0.5)
    assert spec.preprocessing.std == (0.25, 0.25, 0.25)
    assert (spec.preprocessing.interpolation, spec.preprocessing.crop_pct) == ("lanczos", 0.9)
    assert spec.native_resolution == (24, 24)


def test_arch_kwargs_reach_the_factory(here):
    options = replace(SMALL, arch_kwargs=(("classes", 7), ("channels", 1)))

    loaded = models.load(f"{here}:tiny", options)

    assert loaded.module.head.out_features == 7
    assert loaded.spec.channels == 1
    assert len(loaded.spec.preprocessing.mean) == 1


def test_a_configuration_that_names_other_channels_than_the_network_takes_is_not_believed(here):
    loaded = models.load(f"{here}:configured", LoadOptions(arch_kwargs=(("channels", 5),)))

    assert loaded.spec.channels == 5
    assert loaded.spec.preprocessing.mean == pytest.approx((0.2,) * 5)  # the mean of the three that it gives
    assert loaded.spec.native_resolution == (40, 48)


def test_a_dictionary_with_out_is_segmentation(here):
    loaded = models.load(f"{here}:Dense", SMALL)

    assert loaded.spec.task == "segmentation"
    assert loaded.module(torch.ones(1, 3, 8, 8)).shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tinny", "has no 'tinny', did you mean 'tiny'"),
        ("constant", "is not callable: it is a int; name a function that returns the model"),
        ("broken", "raised ValueError: no weights here"),
        ("nothing", "must return a torch.nn.Module, not dict"),
        (
            "Demanding",
            r"does not run on an input of 1x3x224x224: RuntimeError: wants 32; set its own size with --native",
        ),
    ],
)
def test_factories_that_fail_say_so_in_one_line(here, factory, message):
    with pytest.raises(ConfigError, match=message) as caught:
        models.load(f"{here}:{factory}", OPTIONS)
    assert "\n" not in str(caught.value)


def test_a_factory_whose_output_is_no_tensor(here):
    with pytest.raises(Unsupported, match=r"Pair returns a tuple of 2 for one image: rdeploy needs one tensor"):
        models.load(f"{here}:Pair", SMALL)


def test_boxes_whose_number_depends_on_the_image_are_refused_with_the_way_out(here):
    with pytest.raises(Unsupported, match=r"number of rows depends on the image.*returns its raw boxes and scores"):
        models.load(f"{here}:Boxes", SMALL)


def test_the_logits_of_a_dictionary_are_its_answer(here):
    loaded = models.load(f"{here}:Heads", SMALL)

    assert loaded.spec.task == "classification"
    assert loaded.module(torch.ones(1, 3, 8, 8)).shape == (1, 3)


def test_a_task_that_the_output_cannot_answer_is_refused(here):
    with pytest.raises(
        Unsupported, match=r"shape \(1, 3\) for one image, but segmentation needs \(1, channels, H, W\)"
    ):
        models.load(f"{here}:Heads", replace(SMALL, task="segmentation"))


def test_factory_modules_that_cannot_be_imported(here, tmp_path):
    (tmp_path / f"needs_{here}.py").write_text("import a_package_that_is_not_there")
    (tmp_path / f"raises_{here}.py").write_text("1 / 0")

    with pytest.raises(ConfigError, match="no module 'nowhere' for nowhere.deep:net"):
        models.load("nowhere.deep:net", OPTIONS)
    with pytest.raises(ConfigError, match=r"importing needs_.* failed: ModuleNotFoundError: .*a_package_that_is_not"):
        models.load(f"needs_{here}:net", OPTIONS)
    with pytest.raises(ConfigError, match="failed: ZeroDivisionError"):
        models.load(f"raises_{here}:net", OPTIONS)


def test_the_search_path_is_left_as_it_was(here):
    import sys

    before = list(sys.path)
    models.load(f"{here}:tiny", SMALL)
    assert sys.path == before


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".bin"])
def test_state_dicts_in_every_wrapping(here, tmp_path, suffix):
    net = build(here, "tiny")
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(
            net.state_dict(), str(file)
        )
    else:
        torch.save(net.state_dict(), file)

    loaded = models.load(str(file), replace(SMALL, arch=f"{here}:tiny"))

    assert loaded.spec.name == "weights"
    assert torch.equal(loaded.module.head.weight, net.head.weight)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {}, "model_ema": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
        lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    ],
)
def test_what_training_scripts_wrap_around_a_state_dict(here, tmp_path, wrap):
    net = build(here, "tiny")
    torch.save(wrap(net.state_dict()), tmp_path / "w.pt")

    loaded = models.load(str(tmp_path / "w.pt"), replace(SMALL, arch=f"{here}:tiny"))

    assert torch.allclose(loaded.module.head.weight, net.head.weight, atol=1e-3)


def test_a_legacy_checkpoint(here, tmp_path):
    net = build(here, "tiny")
    torch.save(net.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)

    loaded = models.load(str(tmp_path / "w.pth"), replace(SMALL, arch=f"{here}:tiny"))

    assert torch.equal(loaded.module.head.weight, net.head.weight)


def test_a_state_dict_without_arch(here, tmp_path):
    torch.save(build(here, "tiny").state_dict(), tmp_path / "w.pt")

    with pytest.raises(
        ConfigError, match=r"holds weights without their network \(9 tensors, the first is 'conv.weight"
    ):
        models.load(str(tmp_path / "w.pt"), OPTIONS)


def test_a_state_dict_of_another_network_names_the_keys(here, tmp_path):
    state = build(here, "tiny", classes=7).state_dict()
    state["extra.weight"] = torch.zeros(3)
    del state["conv.bias"]
    torch.save(state, tmp_path / "w.pt")

    with pytest.raises(ConfigError) as caught:
        models.load(str(tmp_path / "w.pt"), LoadOptions(arch=f"{here}:tiny"))

    said = str(caught.value)
    assert "1 missing (conv.bias)" in said
    assert "1 unexpected (extra.weight)" in said
    assert "2 misshaped (head.weight is 7x4 where 5x4 belongs, head.bias is 7 where 5 belongs)" in said
    assert "pass --arch-kwargs num_classes=7" in said


def test_many_wrong_keys_are_counted_not_listed(here, tmp_path):
    torch.save({f"layer{i}": torch.zeros(1) for i in range(40)}, tmp_path / "w.pt")

    with pytest.raises(ConfigError, match=r"40 unexpected \(layer0, layer1, layer2, \.\.\.\)"):
        models.load(str(tmp_path / "w.pt"), LoadOptions(arch=f"{here}:tiny"))


def test_torchscript(here, tmp_path):
    net = build(here, "tiny")
    with pytest.warns((FutureWarning, DeprecationWarning)) if _deprecates_script() else _nothing():
        torch.jit.script(net).save(tmp_path / "net.pt")

    loaded = models.load(str(tmp_path / "net.pt"), SMALL)

    image = torch.rand(2, 3, 32, 32)
    assert torch.allclose(loaded.module(image), net(image))
    assert loaded.spec.name == "net"


def test_an_exported_program_knows_its_size(here, tmp_path):
    net = build(here, "tiny")
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 24, 32),)), tmp_path / "net.pt2")

    loaded = models.load(str(tmp_path / "net.pt2"), OPTIONS)

    image = torch.rand(1, 3, 24, 32)
    assert torch.allclose(loaded.module(image), net(image), atol=1e-6)
    assert loaded.spec.native_resolution == (24, 32)
    assert loaded.spec.channels == 3


def test_an_exported_program_with_dynamic_sizes(here, tmp_path):
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        build(here, "tiny"), (torch.zeros(2, 3, 24, 32),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    torch.export.save(program, tmp_path / "net.pt2")

    loaded = models.load(str(tmp_path / "net.pt2"), OPTIONS)

    assert loaded.spec.native_resolution == (24, 32)
    assert loaded.module(torch.rand(3, 3, 40, 40)).shape == (3, 5)


def test_kinds_are_told_by_content_not_by_name(here, tmp_path):
    net = build(here, "tiny")
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 24, 24),)), tmp_path / "a.pt2")
    (tmp_path / "a.pt2").rename(tmp_path / "a.pt")
    torch.save(net.state_dict(), tmp_path / "b.safetensors")

    assert models.load(str(tmp_path / "a.pt"), OPTIONS).spec.native_resolution == (24, 24)
    assert models.load(str(tmp_path / "b.safetensors"), replace(SMALL, arch=f"{here}:tiny")).spec.name == "b"


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "legacy.pth", "w.safetensors", "net.pt2", "script.pt"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_file_is_one_line(here, tmp_path, name, kept):
    net = build(here, "tiny")
    file = tmp_path / name
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(
            net.state_dict(), str(file)
        )
    elif name.endswith(".pt2"):
        torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 24, 24),)), file)
    else:
        torch.save(net.state_dict(), file, _use_new_zipfile_serialization=name != "legacy.pth")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])

    with pytest.raises(ConfigError, match="damaged|cut off") as caught:
        models.load(str(file), LoadOptions(arch=None if name == "net.pt2" else f"{here}:tiny"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"hello world, this is text", "is not a model: it starts with b'hello wo'"),
        (b"PK\x05\x06" + bytes(18), "is a zip archive, but not one that PyTorch wrote"),
        (b"\x80\x04K\x03.", "is damaged, cut off, or no PyTorch checkpoint"),
    ],
)
def test_files_that_are_no_models(tmp_path, content, message):
    file = tmp_path / "m.pt"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=message) as caught:
        models.load(str(file), LoadOptions(arch="timm:resnet18"))
    assert "\n" not in str(caught.value)


def test_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder: name a model file"):
        models.load(str(tmp_path), OPTIONS)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "is not a model: it holds a list, no state dict"),
        ({"epoch": 1}, r"is not a model: its dictionary holds no tensors \(keys: 'epoch'\)"),
        (torch.zeros(3), "is not a model: it holds a Tensor, no state dict"),
    ],
)
def test_checkpoints_that_hold_no_model(tmp_path, saved, message):
    torch.save(saved, tmp_path / "m.pt")

    with pytest.raises(ConfigError, match=message):
        models.load(str(tmp_path / "m.pt"), OPTIONS)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("", {}, ConfigError, "no model was named"),
        ("timm:resnet18", {"arch": "timm:resnet18"}, ConfigError, "names its own architecture: drop --arch"),
    ],
)
def test_requests_that_make_no_sense(source, options, error, message):
    for function in (models.load, models.source_key):
        with pytest.raises(error, match=message):
            function(source, LoadOptions(**options))


def test_options_that_do_not_go_with_a_file(here, tmp_path):
    net = build(here, "tiny")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 24, 24),)), tmp_path / "net.pt2")

    with pytest.raises(ConfigError, match=r"--random-init and the weights file .*w\.pt exclude each other"):
        models.load(str(tmp_path / "w.pt"), LoadOptions(arch=f"{here}:tiny", random_init=True))
    with pytest.raises(ConfigError, match=r"net\.pt2 holds its own architecture: drop --arch"):
        models.load(str(tmp_path / "net.pt2"), LoadOptions(arch=f"{here}:tiny"))
    with pytest.raises(ConfigError, match="'resnet18' names no architecture: give timm:NAME"):
        models.load(str(tmp_path / "w.pt"), LoadOptions(arch="resnet18"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "--mean has 2 values, but the model takes 3 channels"),
        ({"std": (0.0,)}, "--std must be positive, not 0.0"),
        ({"mean": (float("nan"),)}, "--mean and --std must be finite numbers"),
        ({"crop_pct": 1.5}, "--crop-pct must be over 0 and at most 1, not 1.5"),
        ({"interpolation": "bicubik"}, "unknown interpolation 'bicubik', did you mean 'bicubic'"),
        ({"task": "clasification"}, "unknown task 'clasification', did you mean 'classification'"),
    ],
)
def test_overrides_that_do_not_fit(here, options, message):
    with pytest.raises(ConfigError, match=message):
        models.load(f"{here}:tiny", replace(SMALL, **options))


def test_pretrained_cfg_of_the_wrong_kind(here, tmp_path):
    (tmp_path / f"cfg_{here}.py").write_text(
        "from torch import nn\n"
        "def one():\n    net = nn.Flatten()\n    net.pretrained_cfg = 'x'\n    return net\n"
        "def two():\n    net = nn.Flatten()\n    net.pretrained_cfg = {'input_size': 224}\n    return net\n"
    )

    with pytest.raises(ConfigError, match="pretrained_cfg of Flatten must be a dict, not str"):
        models.load(f"cfg_{here}:one", OPTIONS)
    with pytest.raises(ConfigError, match=r"input_size must be \(channels, height, width\), not 224"):
        models.load(f"cfg_{here}:two", OPTIONS)


def test_without_torch(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match=r"PyTorch, which is not installed; install it with: pip install 'rdep"):
        models.load("timm:resnet18", OPTIONS)


def _deprecates_script():
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_the_name_is_fit_for_a_folder(here, tmp_path):
    torch.save(build(here, "tiny").state_dict(), tmp_path / "my model (1).pt")

    assert models.load(str(tmp_path / "my model (1).pt"), replace(SMALL, arch=f"{here}:tiny")).spec.name == "my-model-1"
