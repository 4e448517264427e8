import hashlib
import json

import pytest

from rdeploy.backends import _trt, _trt_options
from rdeploy.errors import MissingDependency, StageError, Unsupported
from rdeploy.types import Target

VERSIONS = ("8.5", "8.6", "10.3", "10.13", "10.16", "11.4")


def build(flavour, tmp_path, *, options=None, timing=None, weak=False, **target):
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"onnx")
    return _trt.build_plan(
        flavour,
        onnx,
        tmp_path,
        target=Target(name="t", **target),
        options=options or _trt_options.BuildOptions(),
        configure=lambda config: config.set_flag("mine"),
        timing=timing,
        weak=weak,
    )


@pytest.mark.parametrize(
    ("version", "flags"), [("8.5", 0b1), ("8.6", 0b1), ("10.3", 0b11), ("10.13", 0b11), ("10.16", 0b11), ("11.4", 0b1)]
)
def test_network_flags_are_those_that_the_version_has(fake, version, flags):
    flavour, _ = fake(version)

    assert _trt.network_flags(flavour.trt) == flags
    assert _trt.is_weakly_typed(flavour.trt) == version.startswith("8.")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_sets_nothing_that_the_version_lacks(fake, tmp_path, version):
    flavour, calls = fake(version)

    plan = build(flavour, tmp_path, batch_sizes=(2, 1, 8))

    assert plan.path == tmp_path / "tensorrt.engine"
    assert plan.path.read_bytes() == b"plan"
    untold = ("builder.build_serialized_network", "config.set_preview_feature")
    assert [call[:2] for call in calls if call[0] not in untold] == [
        ("builder.create_network", _trt.network_flags(flavour.trt)),
        ("builder.create_builder_config",),
        ("config.profiling_verbosity", flavour.trt.ProfilingVerbosity.DETAILED),
        ("config.set_flag", "mine"),
        ("builder.create_optimization_profile",),
        ("profile.set_shape", "x"),
        ("config.add_optimization_profile", calls[-2][1]),
    ]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ([("CONVOLUTION", "FLOAT")], []),
        ([("QUANTIZE", "INT8"), ("DEQUANTIZE", "FLOAT"), ("CONVOLUTION", "FLOAT")], ["INT8"]),
        ([("CAST", "HALF")], ["FP16"]),
        ([("DEQUANTIZE", "FLOAT"), ("CONVOLUTION", "HALF")], ["INT8", "FP16"]),
    ],
)
def test_a_weakly_typed_version_may_use_the_precisions_that_the_graph_holds(fake, tmp_path, layers, wanted, flags_set):
    weak, weak_calls = fake("8.6", layers=layers)
    strong, strong_calls = fake("11.4", layers=layers)

    build(weak, tmp_path)
    build(strong, tmp_path)

    assert flags_set(weak, weak_calls) == wanted
    assert flags_set(strong, strong_calls) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_contexts_share_profiles_where_a_build_decides_that(fake, tmp_path, version):
    flavour, calls = fake(version)

    build(flavour, tmp_path)

    told = [call[1:] for call in calls if call[0] == "config.set_preview_feature"]
    assert told == ([(flavour.trt.PreviewFeature.PROFILE_SHARING_0806, True)] if version == "8.6" else [])


def test_a_dynamic_batch_ranges_over_the_targets_batch_sizes_tuned_for_the_first(fake, tmp_path):
    flavour, calls = fake("10.3")

    build(flavour, tmp_path, batch_sizes=(2, 1, 8))

    assert ("profile.set_shape", "x", (1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8)) in calls


def test_a_static_batch_needs_no_shape_range(fake, tmp_path):
    flavour, calls = fake("10.3", shape=(1, 3, 8, 8))

    build(flavour, tmp_path)

    assert not any(name.startswith("profile") for name, *_ in calls)


def test_a_dynamic_resolution_is_unsupported(fake, tmp_path):
    flavour, _ = fake("10.3", shape=(1, 3, -1, -1))

    with pytest.raises(Unsupported, match=r"x: float32 \[1, 3, \?, \?\]: only the first dimension may be dynamic"):
        build(flavour, tmp_path)


@pytest.mark.parametrize(("dtypes", "name"), [(("BF16", "FLOAT"), "x"), (("FLOAT", "BF16"), "y")])
def test_a_type_that_numpy_lacks_is_unsupported_in_words(fake, tmp_path, dtypes, name):
    flavour, _ = fake("10.3", dtypes=dtypes)

    with pytest.raises(Unsupported) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == (
        f"TensorRT: the tensor '{name}' is BF16, a type that NumPy does not have; "
        "export the model with inputs and outputs in FP32 or FP16"
    )


def test_a_refused_node_is_named(fake, tmp_path):
    flavour, _ = fake("10.3", parses=False)

    with pytest.raises(Unsupported) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == "TensorRT refuses node 'n3' (Foo) of model.onnx: some reason"


def test_a_failed_build_says_the_builders_last_error_and_keeps_the_log(fake, tmp_path):
    flavour, _ = fake("10.3", serialized=None)

    with pytest.raises(StageError) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == "build: TensorRT cannot build model.onnx: Myelin (no kernel)"
    assert "no kernel" in (tmp_path / "tensorrt.log").read_text()
    assert not (tmp_path / "tensorrt.engine").exists()


def test_every_range_is_an_optimization_profile(fake, tmp_path):
    flavour, calls = fake("10.3")

    build(flavour, tmp_path, options=_trt_options.BuildOptions(profile_per_batch=True), batch_sizes=(1, 8))

    shapes = [call[2:] for call in calls if call[0] == "profile.set_shape"]
    assert shapes == [((1, 3, 8, 8),) * 3, ((2, 3, 8, 8), (8, 3, 8, 8), (8, 3, 8, 8))]
    assert sum(call[0] == "config.add_optimization_profile" for call in calls) == 2


def test_the_timing_cache_is_read_and_written_back(fake, tmp_path):
    flavour, calls = fake("10.3")
    cache = tmp_path / "timing" / "one.cache"

    build(flavour, tmp_path, timing=cache)
    assert ("config.create_timing_cache", b"") in calls
    assert cache.read_bytes() == b"times"
    build(flavour, tmp_path, timing=cache)

    assert ("config.create_timing_cache", b"times") in calls
    assert not [call for call in calls if call[0] == "timing.combine"]
    assert [file.name for file in cache.parent.iterdir()] == ["one.cache"]


def test_a_timing_cache_that_is_refused_is_begun_anew(fake, tmp_path):
    flavour, calls = fake("10.3")
    cache = tmp_path / "one.cache"
    cache.write_bytes(b"bad")

    build(flavour, tmp_path, timing=cache)

    created = [call[1] for call in calls if call[0] == "config.create_timing_cache"]
    assert created == [b"bad", b""]
    assert cache.read_bytes() == b"times"


def test_a_version_without_names_tells_the_number_of_the_node(fake, tmp_path):
    flavour, _ = fake("8.6", parses=False)

    with pytest.raises(Unsupported, match=r"TensorRT refuses node number 3 of model.onnx: some reason"):
        build(flavour, tmp_path)


@pytest.fixture
def from_pytorch(tmp_path):
    """Four nodes as PyTorch's exporter writes them; the last, number 3, is `n3` of the module layer1.0.conv1."""
    onnx = pytest.importorskip("onnx", reason="the graph is written with onnx: pip install 'rdeploy[torch]'")
    nodes = [onnx.helper.make_node("Relu", ["x"], [f"a{i}"], name=f"n{i}") for i in range(4)]
    entry = nodes[3].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d_1']"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value], [])), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(("version", "operator"), [("8.5", "Relu"), ("11.4", "Foo")])
def test_a_refused_node_is_found_in_the_users_model(fake, from_pytorch, version, operator):
    flavour, _ = fake(version, parses=False)
    parser = flavour.trt.OnnxParser(None, None)

    message = str(_trt.refusal(flavour, parser, from_pytorch))

    assert message == f"TensorRT refuses node 'n3' ({operator}), in layer1.0.conv1, of model.onnx: some reason"


def test_a_layer_that_the_builder_names_is_found_in_the_users_model(fake, from_pytorch, tmp_path):
    flavour, _ = fake("10.3")
    flavour.trt.Builder, make = None, flavour.trt.Builder

    def without_the_usual_error(logger):
        builder = make(logger)
        builder._results["build_serialized_network"] = lambda network, config: logger.log(
            1, "Could not find any implementation for node {ForeignNode[n0...n3]}."
        )
        return builder

    flavour.trt.Builder = without_the_usual_error

    with pytest.raises(StageError) as caught:
        _trt.build_plan(
            flavour, from_pytorch, tmp_path, target=Target(name="t"), options=_trt_options.BuildOptions(),
            configure=lambda config: None,
        )  # fmt: skip

    assert "node {ForeignNode[n0...n3]}.; n3 is in layer1.0.conv1 (no kernel of this version" in str(caught.value)


def test_without_a_driver_there_is_no_builder(fake, tmp_path):
    flavour, _ = fake("8.6")

    def no_driver(logger):
        logger.log(2, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    flavour.trt.Builder = no_driver

    with pytest.raises(MissingDependency) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == (
        "TensorRT makes no builder without an NVIDIA driver that fits: CUDA initialization failure with error: 35"
    )


def test_the_same_complaint_is_told_once(fake, tmp_path):
    flavour, _ = fake("11.4", parses=False, errors=3)

    with pytest.raises(Unsupported) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == "TensorRT refuses node 'n3' (Foo) of model.onnx: some reason"


def test_stripped_weights_leave_a_note_of_where_they_come_from(fake, tmp_path):
    flavour, _ = fake("10.3")

    plan = build(flavour, tmp_path, options=_trt_options.BuildOptions(strip_weights=True))

    sidecar = json.loads(plan.path.with_name("tensorrt.engine.refit").read_text())
    assert sidecar == {"onnx_sha256": hashlib.sha256(b"onnx").hexdigest()}


def test_the_logger_exists_once_and_keeps_warnings_but_not_the_verbose_stream(fake, tmp_path):
    flavour, _ = fake("10.3")
    logger = _trt.logger_of(flavour)

    with _trt.recorded(logger, tmp_path / "log") as lines:
        for severity, message in ((1, "bad"), (3, "told"), (4, "chatter"), (4, "Layers:\nall")):
            logger.log(severity, message)
    logger.log(1, "afterwards")

    assert _trt.logger_of(flavour) is logger
    assert lines == [(1, "bad"), (3, "told"), (4, "Layers:\nall")]
    assert list(logger.recent) == [(1, "bad"), (1, "afterwards")]


def test_the_last_error_is_one_line_without_source_positions():
    lines = [
        (1, "first"),
        (1, "IBuilder::build: Error Code 1: Myelin (oh\n no In f at /_src/a.cpp:12)"),
        (2, "warning"),
    ]

    assert _trt.last_error(lines) == "Myelin (oh no)"
    assert _trt.last_error([]) == "no reason given"
