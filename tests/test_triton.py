"""What is written for Triton, read with Triton's own definition of a model's configuration."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from rdeploy import backends, bundle, cli, rebuild, triton
from rdeploy.errors import ConfigError, Unsupported
from rdeploy.results import EngineResult
from rdeploy.types import OnnxModel, TensorInfo


@pytest.fixture(scope="module")
def definition():
    """Triton's model_config.proto as its client package has it; loaded by path, since the package itself wants grpc."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed: pip install 'rdeploy[test]'")
    file = Path(next(iter(found.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(definition):
    from google.protobuf import text_format

    def read(place):
        return text_format.Parse((place / "config.pbtxt").read_text(), definition.ModelConfig())

    return read


def tensors(batch):
    inputs = (TensorInfo(name="input", dtype="float32", shape=(batch, 3, 6, 6)),)
    return inputs, (TensorInfo(name="output", dtype="float32", shape=(batch, 3)),)


@pytest.fixture
def make(tmp_path, result):
    """Write a bundle with engines of the given backends, whose graph has this batch (-1 is dynamic)."""

    def write(*names, batch=-1, batch_sizes=(1, 4, 8), options=(), engines=True):
        source = tmp_path / "built"
        source.mkdir(exist_ok=True)
        (source / "model.onnx").write_bytes(b"graph")
        inputs, outputs = tensors(batch)
        graph = OnnxModel(
            path=str(source / "model.onnx"), sha256=backends.engine_sha256(source / "model.onnx"), precision="fp32",
            opset=17, inputs=inputs, outputs=outputs,
        )  # fmt: skip
        built = []
        for name in names:
            files = ("openvino.xml", "openvino.bin") if name == "openvino" else (f"{name}.engine",)
            for file in files:
                (source / file).write_bytes(f"{name} {file}".encode())
            first = result.variants[0].engines[0]
            engine = dataclasses.replace(
                first.engine, backend=name, path=files[0], built_for=("sm_86",) if "tensorrt" in name else (),
                backend_version="10.3.0",
            )  # fmt: skip
            built.append(EngineResult(backend=name, engine=engine, verification=first.verification))
        target = dataclasses.replace(result.target, batch_sizes=batch_sizes, backend_options=(("tensorrt", options),))
        row = dataclasses.replace(result.variants[0], engines=tuple(built) if engines else ())
        return bundle.write(
            tmp_path / "net-r6-int8", result=dataclasses.replace(result, target=target), row=row,
            onnx=source / "model.onnx", engines={one.engine.path: source for one in built},
            graphs=dict.fromkeys(names, graph),
        )  # fmt: skip

    return write


def test_a_tensorrt_engine_with_a_dynamic_batch(make, parse, tmp_path):
    folder = make("tensorrt", options=(("profile_per_batch", True),))

    place = triton.package(folder, tmp_path / "models", serving=triton.Serving(instances=2, max_queue_delay_us=500))

    found = parse(place)
    assert place == tmp_path / "models" / "net-r6-int8"
    assert (place / "1" / "model.plan").read_bytes() == b"tensorrt tensorrt.engine"
    assert (found.name, found.platform, found.max_batch_size) == ("net-r6-int8", "tensorrt_plan", 8)
    assert (found.input[0].name, list(found.input[0].dims)) == ("input", [3, 6, 6])
    assert (found.output[0].name, list(found.output[0].dims)) == ("output", [3])
    assert found.output[0].label_filename == "labels.txt"
    assert (place / "labels.txt").read_text().splitlines() == ["red", "green ish", "blue"]
    assert list(found.dynamic_batching.preferred_batch_size) == [4, 8]
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    (group,) = found.instance_group
    assert (group.count, group.kind, list(group.profile)) == (2, group.KIND_GPU, ["0", "1", "2"])
    assert found.optimization.cuda.graphs
    assert [(w.batch_size, list(w.inputs["input"].dims)) for w in found.model_warmup] == [
        (1, [3, 6, 6]),
        (4, [3, 6, 6]),
        (8, [3, 6, 6]),
    ]
    assert "sm_86, in a Triton whose TensorRT has that very version" in (place / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("name", "backend", "files"),
    [("onnxruntime", "onnxruntime", {"model.onnx"}), ("openvino", "openvino", {"model.xml", "model.bin"})],
)
def test_the_runtimes_of_cpus(make, parse, tmp_path, name, backend, files):
    place = triton.package(make(name), tmp_path / "models")

    found = parse(place)
    assert (found.backend, found.platform) == (backend, "")
    assert found.instance_group[0].kind == found.instance_group[0].KIND_CPU
    assert {file.name for file in (place / "1").iterdir()} == files
    assert not found.optimization.cuda.graphs


def test_a_fixed_batch_is_part_of_the_shape(make, parse, tmp_path):
    place = triton.package(make("onnxruntime", batch=2, batch_sizes=(2,)), tmp_path / "models")

    found = parse(place)
    assert (found.max_batch_size, list(found.input[0].dims)) == (0, [2, 3, 6, 6])
    assert not found.HasField("dynamic_batching")
    assert [(w.batch_size, list(w.inputs["input"].dims)) for w in found.model_warmup] == [(0, [2, 3, 6, 6])]
    assert "build with --batch 1 --batch 8" in (place / "config.pbtxt").read_text()


def test_ranges_of_the_profile_are_instances_profiles(make, parse, tmp_path):
    folder = make("tensorrt", options=(("batch_ranges", ((1, 1, 4), (5, 8, 8))),))

    assert list(parse(triton.package(folder, tmp_path / "models")).instance_group[0].profile) == ["0", "1"]


def test_an_engine_for_a_dla_core_is_given_that_core(make, parse, tmp_path):
    (group,) = parse(triton.package(make("tensorrt", options=(("dla_core", 1),)), tmp_path / "models")).instance_group

    (device,) = group.secondary_devices
    assert (device.kind, device.device_id) == (device.KIND_NVDLA, 1)


def test_an_engine_without_weights_is_refused_with_the_way_out(make, tmp_path):
    folder = make("tensorrt", "onnxruntime", options=(("strip_weights", True),))

    with pytest.raises(Unsupported, match="holds no weights, and Triton cannot put them back: build it without strip"):
        triton.package(folder, tmp_path / "models")

    assert not (tmp_path / "models").exists()
    assert triton.package(folder, tmp_path / "models", backend="onnxruntime").is_dir()


def test_an_engine_that_brings_its_runtime_says_what_triton_is_started_with(make, parse, tmp_path):
    place = triton.package(
        make("tensorrt", options=(("version_compatible", True), ("lean_runtime", True))), tmp_path / "models"
    )

    assert parse(place).platform == "tensorrt_plan"
    text = (place / "config.pbtxt").read_text()
    assert "sm_86, in a Triton whose TensorRT has that version or a later one of the same major" in text
    assert "--backend-config=tensorrt,version-compatible=true" in text


def test_the_command_replaces_its_own_model_and_nothing_else(make, tmp_path, capsys):
    folder, models = make("openvino", "onnxruntime"), tmp_path / "models"
    words = ["package", str(folder), "--triton", str(models)]

    assert cli.execute([*words, "--backend", "onnxruntime"]) == 0
    assert cli.execute([*words, "--json"]) == 0

    out = capsys.readouterr().out
    place = models / "net-r6-int8"
    assert out.startswith(str(place))
    assert json.loads(out[out.index("{") :])["config"] == str(place / "config.pbtxt")
    assert {file.name for file in (place / "1").iterdir()} == {"model.xml", "model.bin"}
    (place / "config.pbtxt").unlink()
    assert cli.execute(words) == 2
    assert "exists and is no model of a Triton repository" in capsys.readouterr().err


def test_an_engine_that_is_left_to_the_device_is_built_for_the_server(make, monkeypatch, tmp_path):
    folder = make("tensorrt", engines=False)
    made = tmp_path / "made.engine"
    made.write_bytes(b"for this GPU")
    monkeypatch.setattr(rebuild, "why_not", lambda manifest, name: None)
    monkeypatch.setattr(rebuild, "built_here", lambda folder, manifest, name: made)

    place = triton.package(folder, tmp_path / "models")

    assert (place / "1" / "model.plan").read_bytes() == b"for this GPU"


def test_what_triton_does_not_serve_is_refused(make, tmp_path):
    with pytest.raises(
        Unsupported, match="Triton serves tensorrt, onnxruntime, .*; this bundle's engines are: tensorrt_rtx"
    ):
        triton.package(make("tensorrt_rtx"), tmp_path / "models")


def test_an_engine_that_is_not_there_is_refused(make, tmp_path):
    with pytest.raises(ConfigError, match="this bundle has no tensorrt; its engines: openvino"):
        triton.package(make("openvino"), tmp_path / "models", backend="tensorrt")


def test_a_damaged_engine_is_not_served(make, tmp_path):
    folder = make("openvino")
    (folder / "engines" / "openvino" / "openvino.bin").write_bytes(b"other")

    with pytest.raises(ConfigError, match=r"openvino.bin was truncated or changed"):
        triton.package(folder, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_bundle_of_an_older_rdeploy_does_not_say_its_tensors(written, tmp_path):
    with pytest.raises(ConfigError, match="its manifest does not say its inputs and outputs"):
        triton.package(written, tmp_path / "models")
