import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from rdeploy import models  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.errors import ConfigError, MissingDependency, Unsupported  # noqa: E402


def save(path, *, shape=(1, 3, 20, 24), output=(1, 5), kind=TensorProto.FLOAT, inputs=1, op="GlobalAveragePool"):
    """A convolution, a pooling, a flattening; small, and valid unless asked otherwise."""
    weight = numpy_helper.from_array(np.ones((5, 3, 3, 3), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["a"]),
        helper.make_node(op, ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["scores"]),
    ]
    values = [helper.make_tensor_value_info("images", kind, shape)]
    values += [helper.make_tensor_value_info(f"extra{i}", kind, [1]) for i in range(inputs - 1)]
    graph = helper.make_graph(
        nodes, "net", values, [helper.make_tensor_value_info("scores", TensorProto.FLOAT, output)], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return str(path)


def test_what_the_graph_says(tmp_path):
    loaded = models.load(save(tmp_path / "net.onnx"), LoadOptions())

    assert loaded.module is None
    assert loaded.onnx == tmp_path / "net.onnx"
    assert loaded.spec.native_resolution == (20, 24)
    assert loaded.spec.channels == 3
    assert loaded.spec.task == "classification"
    assert loaded.spec.assumed == ("mean", "std", "interpolation", "crop_pct")


def test_a_dynamic_size_must_be_told(tmp_path):
    source = save(tmp_path / "net.onnx", shape=("n", 3, "h", "w"), output=("n", 5))

    with pytest.raises(ConfigError, match="takes images of any size: say which it was trained at, with --native-res"):
        models.load(source, LoadOptions())
    assert models.load(source, LoadOptions(native_resolution=(32, 40))).spec.native_resolution == (32, 40)


def test_a_fixed_size_cannot_be_told_otherwise(tmp_path):
    source = save(tmp_path / "net.onnx")

    with pytest.raises(ConfigError, match="takes images of 20x24 only: drop --native-resolution"):
        models.load(source, LoadOptions(native_resolution=(32, 32)))


def test_the_suffix_does_not_matter(tmp_path):
    save(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").rename(tmp_path / "net.bin")

    assert models.load(str(tmp_path / "net.bin"), LoadOptions()).spec.name == "net"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": 2}, "has 2 inputs: rdeploy takes models with one"),
        ({"shape": (1, 20, 24, 3)}, r"takes \(N, H, W, C\) images"),
        ({"shape": (3, 20, 24)}, "takes an input of 3 dimensions"),
        ({"kind": TensorProto.UINT8}, "takes uint8 input: rdeploy takes floating-point images"),
    ],
)
def test_inputs_that_are_no_images(tmp_path, monkeypatch, change, message):
    # The checker would refuse some of these graphs first; here the words about the input are what counts.
    monkeypatch.setattr("onnx.checker.check_model", lambda path: None)

    with pytest.raises(Unsupported, match=message):
        models.load(save(tmp_path / "net.onnx", **change), LoadOptions())


def test_an_invalid_graph(tmp_path):
    with pytest.raises(ConfigError, match="is not a valid ONNX model: .*NoSuchOperator") as caught:
        models.load(save(tmp_path / "net.onnx", op="NoSuchOperator"), LoadOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x08\x08garbage", b"hello", b"\x08\x08"])
def test_a_file_that_is_no_onnx(tmp_path, content):
    (tmp_path / "net.onnx").write_bytes(content)

    with pytest.raises(ConfigError, match="is not an ONNX model"):
        models.load(str(tmp_path / "net.onnx"), LoadOptions())


def test_a_truncated_file(tmp_path):
    source = save(tmp_path / "net.onnx")
    data = (tmp_path / "net.onnx").read_bytes()
    (tmp_path / "net.onnx").write_bytes(data[: len(data) // 2])

    with pytest.raises(ConfigError, match="damaged or cut off"):
        models.load(source, LoadOptions())


def with_external_data(path, location):
    source = save(path)
    model = onnx.load(source)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(model.SerializeToString())
    return source


def test_external_data_beside_the_model(tmp_path):
    (tmp_path / "net.data").write_bytes(np.ones((5, 3, 3, 3), np.float32).tobytes())
    source = with_external_data(tmp_path / "net.onnx", "net.data")

    first = models.load(source, LoadOptions()).spec.sha256
    key = models.source_key(source, LoadOptions())
    (tmp_path / "net.data").write_bytes(np.zeros((5, 3, 3, 3), np.float32).tobytes())

    assert models.load(source, LoadOptions()).spec.sha256 != first
    assert models.source_key(source, LoadOptions()) != key


@pytest.mark.parametrize("location", ["../secret.bin", "deep/../../secret.bin", "link.bin"])
def test_external_data_outside_the_models_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(540))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")

    with pytest.raises(ConfigError, match=f"reads tensors from {location}, outside its own folder: refused"):
        models.load(with_external_data(folder / "net.onnx", location), LoadOptions())


def test_an_absolute_path_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="reads tensors from /etc/passwd, outside its own folder"):
        models.load(with_external_data(tmp_path / "net.onnx", "/etc/passwd"), LoadOptions())


def test_external_data_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"needs the file net\.data beside it, which is not there"):
        models.load(with_external_data(tmp_path / "net.onnx", "net.data"), LoadOptions())


def test_external_data_in_a_subgraph_is_found(tmp_path):
    source = save(tmp_path / "net.onnx")
    model = onnx.load(source)
    hidden = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    entry = hidden.external_data.add()
    entry.key, entry.value = "location", "../secret.bin"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["x"], value=hidden)],
        "branch",
        [],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
    )
    model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(ConfigError, match=r"reads tensors from \.\./secret\.bin, outside"):
        models.load(source, LoadOptions())


def test_arch_and_random_init_do_not_go_with_onnx(tmp_path):
    source = save(tmp_path / "net.onnx")

    with pytest.raises(ConfigError, match="holds its own architecture: drop --arch"):
        models.load(source, LoadOptions(arch="timm:resnet18"))
    with pytest.raises(ConfigError, match="--random-init and the weights file"):
        models.load(source, LoadOptions(random_init=True))


def test_without_onnx(tmp_path, monkeypatch):
    import sys

    source = save(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)

    with pytest.raises(MissingDependency, match="onnx is not installed; install it with: pip install"):
        models.load(source, LoadOptions())
