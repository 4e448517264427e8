import json

import numpy as np
import pytest

from rdeploy import backends, hardware
from rdeploy.backends import _trt, _trt_session, tensorrt
from rdeploy.errors import ConfigError, MissingDependency, Unsupported
from rdeploy.types import Target


@pytest.fixture
def installed(monkeypatch, fake):
    flavour, calls = fake("10.3")
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
    assert any(call[0] == "config.set_memory_pool_limit" and call[2] == 1 << 20 for call in installed)


def test_layers_log_and_fingerprint_lie_beside_the_engine(installed, gpu, tmp_path):
    engine = build(tmp_path, options={"version_compatible": True})

    layers = json.loads((tmp_path / "out" / "tensorrt.layers.json").read_text())["Layers"]
    assert [layer.get("LayerType", layer.get("Name")) for layer in layers] == ["CaskConvolution", "Reformat"]
    assert (tmp_path / "out" / "tensorrt.log").is_file()
    facts = dict(engine.fingerprint)
    assert (facts["version_compatible"], facts["lean_runtime"], facts["compute_capability"]) == (True, False, "sm_89")
    assert {"machine", "cpu_flags", "driver"} <= set(facts)


def test_kernel_times_are_kept_for_the_next_build_on_this_gpu(installed, gpu, tmp_path):
    build(tmp_path)
    cache = tmp_path / "cache" / "timing" / "tensorrt-10.3.0-nvidia-l4.cache"
    assert cache.read_bytes() == b"times"

    cache.unlink()
    build(tmp_path, options={"timing_cache": False})
    assert not cache.exists()


@pytest.fixture
def version(monkeypatch, fake):
    def install(name, **how):
        flavour, calls = fake(name, **how)
        monkeypatch.setattr(tensorrt, "_flavour", lambda: flavour)
        return flavour.trt, calls

    return install


@pytest.mark.parametrize(("name", "weak"), [("8.5", True), ("10.3", True), ("11.4", False)])
def test_dla_is_built_weakly_typed_in_fp16_before_11_and_strongly_typed_since(version, gpu, tmp_path, name, weak):
    trt, calls = version(name)

    engine = build(tmp_path, options={"dla_core": 1})

    flags = [call[1] for call in calls if call[0] == "config.set_flag"]
    assert ("config.default_device_type", trt.DeviceType.DLA) in calls
    assert ("config.DLA_core", 1) in calls
    assert ("runtime.DLA_core", 1) in calls
    assert trt.BuilderFlag.GPU_FALLBACK in flags
    assert (weak and trt.BuilderFlag.FP16 in flags) or (not weak and len(flags) == 1)
    created = next(call[1] for call in calls if call[0] == "builder.create_network")
    assert created == _trt.network_flags(trt, weak=weak)
    assert "built for DLA core 1" in engine.notes


def test_an_engine_for_a_dla_core_runs_on_that_core(version, gpu, fake_cuda, tmp_path):
    trt, calls = version("11.4")
    engine = build(tmp_path, options={"dla_core": 1})
    calls.clear()

    with _trt_session.Session(tmp_path / "out" / engine.path, flavour=tensorrt._flavour, runtime=lambda: fake_cuda):
        assert ("runtime.DLA_core", 1) in calls


@pytest.fixture
def lean_library(monkeypatch, tmp_path):
    """Put a lean runtime of TensorRT 10.3.0 where NVIDIA's packages put it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libnvinfer_lean.so.10.3.0").write_bytes(b"lean runtime")
    return tmp_path / "lib" / "libnvinfer_lean.so.10.3.0"


def test_another_version_opens_an_engine_with_the_lean_runtime_of_the_version_that_built_it(
    version, gpu, lean_library, fake_cuda, tmp_path
):
    pytest.importorskip("cuda.bindings", reason="running needs cuda-python: pip install cuda-python")
    version("10.3", serialized=b"older")
    engine = build(tmp_path, options={"version_compatible": True})
    _, calls = version("10.16")

    assert tensorrt.cannot_run(engine) is None
    with _trt_session.Session(tmp_path / "out" / engine.path, flavour=tensorrt._flavour, runtime=lambda: fake_cuda):
        assert ("runtime.load_runtime", str(lean_library)) in calls
        assert ("lean.deserialize_cuda_engine", b"older") in calls


@pytest.mark.parametrize("content", [None, b"of another release"])
def test_without_that_lean_runtime_the_engine_is_built_again(version, gpu, lean_library, tmp_path, content):
    lean_library.unlink() if content is None else lean_library.write_bytes(content)
    version("10.3")
    engine = build(tmp_path, options={"version_compatible": True})
    version("10.16")

    reason = tensorrt.cannot_run(engine)

    assert isinstance(reason, backends.Misfit)
    assert reason.startswith("built for sm_89 / TensorRT 10.3.0, this is sm_89 / 10.16.1.11: build it again")
    with (
        pytest.raises(
            ConfigError, match=r"engine: the lean runtime of TensorRT 10.3.0, which opens it, is not here or"
        ),
        _trt_session.Session(tmp_path / "out" / engine.path, flavour=tensorrt._flavour),
    ):
        pass


def test_an_engine_with_its_lean_runtime_is_trusted_where_it_was_built(version, gpu, fake_cuda, monkeypatch, tmp_path):
    version("10.3", serialized=b"lean")
    engine = build(tmp_path, options={"version_compatible": True, "lean_runtime": True})
    path = tmp_path / "out" / engine.path

    assert engine.executed_precision == (("int8", 1),)
    with _trt_session.Session(path, flavour=tensorrt._flavour, runtime=lambda: fake_cuda) as session:
        assert session.inputs

    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path / "of somebody else"))
    with (
        pytest.raises(ConfigError, match="brings host code that runs when it is opened; RDEPLOY_TRUST_ENGINE_CODE=1"),
        _trt_session.Session(path, flavour=tensorrt._flavour, runtime=lambda: fake_cuda),
    ):
        pass


def test_an_engine_whose_layers_are_not_told_says_so(version, gpu, tmp_path):
    version("10.3", serialized=b"unreadable")

    engine = build(tmp_path)

    assert engine.executed_precision == ()
    assert engine.notes[-1].startswith("no layer is listed: TensorRT told of none in the engine that it built")


@pytest.mark.parametrize(("name", "lanes"), [("8.5", 1), ("8.6", 2), ("10.3", 2), ("11.4", 2)])
def test_a_stream_has_as_many_contexts_as_the_version_lets_share_a_profile(
    version, gpu, fake_cuda, tmp_path, name, lanes
):
    version(name)
    engine = build(tmp_path)
    batches = [np.full((size, 3), size, np.float32) for size in (1, 2, 4, 3)]

    path = tmp_path / "out" / engine.path
    with _trt_session.Session(path, flavour=tensorrt._flavour, runtime=lambda: fake_cuda) as session:
        found = [made["y"] for made in session.stream({"x": batch} for batch in batches)]
        assert sum(str(name).startswith("stream") for name in fake_cuda.alive) == lanes

    for batch, made in zip(batches, found, strict=True):
        np.testing.assert_array_equal(made, 2 * batch)


def test_without_fallback_everything_must_run_on_dla(version, gpu, tmp_path):
    trt, calls = version("11.4")

    build(tmp_path, options={"dla_core": 0, "gpu_fallback": False})

    assert ("config.set_flag", trt.BuilderFlag.GPU_FALLBACK) not in calls


def test_hardware_compatibility_says_on_which_gpus_it_runs(version, gpu, tmp_path):
    trt, calls = version("11.4")

    engine = build(tmp_path, options={"hardware_compatibility": "ampere_plus"})

    assert ("config.hardware_compatibility_level", trt.HardwareCompatibilityLevel.AMPERE_PLUS) in calls
    assert engine.built_for == ("sm_80+",)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "8.5",
            {"hardware_compatibility": "ampere_plus"},
            Unsupported,
            "has no hardware_compatibility, it came with 8.6",
        ),
        (
            "10.3",
            {"hardware_compatibility": "same_compute_capability"},
            Unsupported,
            "10.3.0 has no hardware_compatibility",
        ),
        (
            "10.3",
            {"hardware_compatibility": "all"},
            ConfigError,
            "unknown hardware_compatibility 'all'; there",
        ),
        (
            "11.4",
            {"tactic_sources": ("CUBLAS",)},
            ConfigError,
            "has no tactic source 'CUBLAS'; there are: EDGE",
        ),
    ],
)
def test_options_that_a_version_lacks_are_refused(version, gpu, tmp_path, name, options, error, message):
    version(name)

    with pytest.raises(error) as caught:
        build(tmp_path, options=options)

    assert message in str(caught.value)


@pytest.mark.parametrize(("sources", "bits"), [((), 0), (("CUBLAS", "CUDNN"), 0b101)])
def test_the_libraries_to_take_kernels_from_can_be_chosen(version, gpu, tmp_path, sources, bits):
    _, calls = version("8.6")

    build(tmp_path, options={"tactic_sources": sources})

    assert ("config.set_tactic_sources", bits) in calls


def test_sparsity_and_weak_typing_are_notes_of_the_engine(version, gpu, tmp_path):
    version("8.6", log=[(3, "(Sparsity) Layers eligible for sparse math: a")])

    engine = build(tmp_path, options={"sparse_weights": True})

    assert "sparse_weights: 1 layers have 2:4 sparse weights, 0 run sparse kernels" in engine.notes
    assert any(note.startswith("weakly typed: ") for note in engine.notes)


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
