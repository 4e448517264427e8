import pytest

from rdeploy import hardware
from rdeploy.backends import tensorrt
from rdeploy.errors import MissingDependency, Unsupported
from rdeploy.types import Target


@pytest.fixture
def installed(monkeypatch, fake):
    flavour, calls = fake(10)
    monkeypatch.setattr(tensorrt, "_flavour", lambda: flavour)
    return calls


def build(tmp_path, **facts):
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"onnx")
    options = tensorrt.Options(**facts.pop("options", {}))
    return tensorrt.build_engine(onnx, tmp_path / "out", target=Target(name="mine", **facts), options=options)


def test_an_engine_is_built_for_the_gpu_that_is_here(installed, gpu, tmp_path):
    engine = build(tmp_path)

    assert (engine.path, engine.backend, engine.backend_version) == ("tensorrt.engine", "tensorrt", "10.3.0")
    assert (engine.device, engine.built_for) == ("NVIDIA L4", ("sm_89",))
    assert engine.executed_precision == (("int8", 1),)


def test_options_reach_the_builder(installed, gpu, tmp_path):
    build(tmp_path, options={"optimization_level": 5, "workspace_mb": 1})

    assert ("config.builder_optimization_level", 5) in installed
    assert ("config.set_memory_pool_limit", "workspace", 1 << 20) in installed


def test_a_profile_for_another_gpu_is_refused(installed, gpu, tmp_path):
    with pytest.raises(Unsupported) as caught:
        build(tmp_path, compute_capabilities=("sm_87",))

    message = "target 'mine' is for sm_87, the GPU here is NVIDIA L4 (sm_89): build there, or with --target auto"
    assert str(caught.value) == message


def test_without_a_gpu_nothing_is_built(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "gpus", lambda: ())

    assert tensorrt.unavailable() == (
        "TensorRT builds on the GPU that will run the engine, and there is no NVIDIA GPU or driver here"
    )
    with pytest.raises(MissingDependency, match="there is no NVIDIA GPU here"):
        build(tmp_path)


def test_an_absent_package_says_where_tensorrt_comes_from(monkeypatch):
    monkeypatch.setattr(tensorrt._engine, "missing", lambda *_: "missing")

    reason = tensorrt.unavailable()

    assert "where JetPack or a container of NVIDIA's brings it, pip must never replace it" in reason
    assert reason.endswith("install it with: pip install 'rdeploy[tensorrt]'")
    assert tensorrt.cannot_run(None) == reason


def test_the_scheme_is_symmetric_and_signed():
    scheme = tensorrt.scheme(Target(name="t"))

    assert (scheme.activations, scheme.residual, scheme.weight_max) == ("int8", "branch", 127)
