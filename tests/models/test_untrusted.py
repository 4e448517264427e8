"""Files made to run code when they are opened: each would create a folder, and none may."""

import io
import json
import os
import pickle
import zipfile

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy import models  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.errors import ConfigError  # noqa: E402

OPTIONS = LoadOptions(native_resolution=(16, 16))
TRUSTING = LoadOptions(native_resolution=(16, 16), trust_pickle=True)


class Evil:
    """Unpickling this makes the folder `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def torch_zip(mark, file):
    torch.save({"weight": torch.zeros(2), "evil": Evil(mark)}, file)


def torch_legacy(mark, file):
    torch.save({"weight": torch.zeros(2), "evil": Evil(mark)}, file, _use_new_zipfile_serialization=False)


def plain_pickle(mark, file):
    file.write_bytes(pickle.dumps({"weight": Evil(mark)}))


def plain_pickle_of_protocol_2(mark, file):
    file.write_bytes(pickle.dumps(Evil(mark), protocol=2))


@pytest.mark.parametrize("make", [torch_zip, torch_legacy, plain_pickle, plain_pickle_of_protocol_2])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".pt2", ".onnx", ".bin"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path, make, suffix):
    mark, file = tmp_path / "ran", tmp_path / f"model{suffix}"
    make(mark, file)

    with pytest.raises(ConfigError) as caught:
        models.load(str(file), OPTIONS)

    assert not mark.exists()
    assert "\n" not in str(caught.value)


def test_the_refusal_names_what_the_pickle_wanted(tmp_path):
    torch_zip(tmp_path / "ran", tmp_path / "m.pt")

    with pytest.raises(
        ConfigError, match=r"needs pickle to run posix\.mkdir, and a pickle can run any code: refused; .*--tr"
    ):
        models.load(str(tmp_path / "m.pt"), OPTIONS)


@pytest.mark.parametrize("make", [torch_zip, torch_legacy])
def test_the_same_file_does_run_when_it_is_trusted(tmp_path, make):
    make(tmp_path / "ran", tmp_path / "m.pt")

    with pytest.raises(ConfigError):
        models.load(str(tmp_path / "m.pt"), TRUSTING)

    assert (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused_and_loads_when_trusted(tmp_path):
    net = network()
    torch.save(net, tmp_path / "m.pt")

    with pytest.raises(ConfigError, match=r"needs pickle to run torch\.nn\.modules\.container\.Sequential"):
        models.load(str(tmp_path / "m.pt"), OPTIONS)

    loaded = models.load(str(tmp_path / "m.pt"), TRUSTING)
    assert torch.equal(loaded.module[0].weight, net[0].weight)
    with pytest.raises(ConfigError, match="holds a whole Sequential, not a state dict: drop --arch"):
        models.load(str(tmp_path / "m.pt"), LoadOptions(trust_pickle=True, arch="timm:resnet18"))


def test_a_trusted_pickle_of_a_class_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vanishing.py").write_text("from torch import nn\nclass Net(nn.Flatten):\n    pass\n")
    import vanishing

    torch.save(vanishing.Net(), tmp_path / "m.pt")
    monkeypatch.delattr(vanishing, "Net")

    with pytest.raises(
        ConfigError, match=r"names a class that is not here: AttributeError: .*Net.*; install its package"
    ):
        models.load(str(tmp_path / "m.pt"), TRUSTING)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """An honest .pt2, as name -> bytes of its records (the archive's own name left out)."""
    file = tmp_path_factory.mktemp("pt2") / "net.pt2"
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        network(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    torch.export.save(exported, file)
    with zipfile.ZipFile(file) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def write(records, file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(f"net/{name}", data)
    return file


def pickled(mark):
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    return buffer.getvalue()


def edited(records, edit):
    model = json.loads(records["models/model.json"])
    edit(model)
    return {**records, "models/model.json": json.dumps(model).encode()}


def in_sample_inputs(records, mark):
    return {**records, "data/sample_inputs/model.pt": pickled(mark)}


def in_legacy_weights(records, mark):
    return {**records, "data/weights/model.pt": pickled(mark)}


def in_a_pickled_weight(records, mark):
    config = json.loads(records["data/weights/model_weights_config.json"])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    return {
        **records,
        "data/weights/model_weights_config.json": json.dumps(config).encode(),
        f"data/weights/{entry['path_name']}": pickled(mark),
    }


def in_an_opaque_constant(records, mark):
    config = {
        "config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    return {
        **records,
        "data/constants/model_constants_config.json": json.dumps(config).encode(),
        "data/constants/opaque_obj_0": pickle.dumps(Evil(mark)),
    }


def in_compiled_code(records, mark):
    return {**records, "data/aotinductor/model/model.so": b"\x7fELF"}


def in_an_operator(records, mark):
    def edit(model):
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"

    return edited(records, edit)


def in_an_extension_operator(records, mark):
    def edit(model):
        model["graph_module"]["graph"]["nodes"][0]["target"] = "#evil:os.system"

    return edited(records, edit)


def in_a_size_expression(records, mark):
    def edit(model):
        for value in model["graph_module"]["graph"]["tensor_values"].values():
            for side in value["sizes"]:
                if "as_expr" in side:
                    side["as_expr"]["expr_str"] = f"__import__('os').mkdir({str(mark)!r})"

    return edited(records, edit)


def in_a_guard(records, mark):
    def edit(model):
        model["guards_code"] = [f"__import__('os').mkdir({str(mark)!r}) is None"]

    return edited(records, edit)


def in_an_input_name(records, mark):
    text = records["models/model.json"].decode()
    name = f"x=__import__('os').mkdir({str(mark)!r})"
    return {**records, "models/model.json": text.replace('"input"', json.dumps(name)).encode()}


def in_an_argument_structure(records, mark):
    def edit(model):
        for call in model["graph_module"]["module_call_graph"]:
            if call["signature"] is not None:
                spec = [1, {"type": "collections.defaultdict", "context": ["os", "getcwd", []], "children_spec": []}]
                call["signature"]["in_spec"] = json.dumps(spec)

    return edited(records, edit)


ATTACKS = {
    in_sample_inputs: r"a pickle \(data/sample_inputs/model\.pt\) that wants posix\.mkdir",
    in_legacy_weights: r"a pickle \(data/weights/model\.pt\) that wants posix\.mkdir",
    in_a_pickled_weight: r"a pickle \(data/weights/weight_0\) that wants posix\.mkdir",
    in_an_opaque_constant: r"a pickle\w* .*\(?data/constants/opaque_obj_0\)",
    in_compiled_code: r"compiled code \(data/aotinductor/model/model\.so\)",
    in_an_operator: r"a call of 'torch\.os\.system'",
    in_an_extension_operator: r"a call of '#evil:os\.system'",
    in_a_size_expression: r"the expression .*__import__",
    in_a_guard: r"the guard .*__import__",
    in_an_input_name: r"the name .*__import__",
    in_an_argument_structure: r"the structure .*defaultdict",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_malicious_exported_program_runs_nothing(program, tmp_path, attack):
    mark = tmp_path / "ran"
    file = write(attack(program, mark), tmp_path / "net.pt2")

    with pytest.raises(ConfigError, match=ATTACKS[attack]) as caught:
        models.load(str(file), OPTIONS)

    assert not mark.exists()
    assert "opening it could run any code: refused; pass --trust-pickle" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [in_a_pickled_weight, in_an_opaque_constant, in_a_size_expression])
def test_the_same_program_does_run_when_it_is_trusted(program, tmp_path, attack):
    """The attacks are real: without the check they succeed."""
    if attack is in_an_opaque_constant and torch.__version__ < "2.14":
        pytest.skip("this PyTorch does not open such constants")
    mark = tmp_path / "ran"
    file = write(attack(program, mark), tmp_path / "net.pt2")

    with pytest.raises(ConfigError):
        models.load(str(file), TRUSTING)

    assert mark.exists()


def test_the_honest_program_passes_the_check(program, tmp_path):
    file = write(program, tmp_path / "net.pt2")

    loaded = models.load(str(file), OPTIONS)

    assert loaded.module(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_the_second_lock_holds_without_the_first(program, tmp_path, monkeypatch):
    """PyTorch's own switch refuses pickles also where the check would have overlooked one, and is put back."""
    from rdeploy.models import exported_program

    monkeypatch.setattr(exported_program, "check_safe", lambda path: None)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    mark = tmp_path / "ran"
    file = write(in_a_pickled_weight(program, mark), tmp_path / "net.pt2")

    with pytest.raises(ConfigError, match="cannot be loaded as an exported program"):
        models.load(str(file), OPTIONS)

    assert not mark.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
