import pytest

from rdeploy.backends import _trt
from rdeploy.errors import StageError, Unsupported
from rdeploy.types import Target

LAYERS = """Layers:
Name: a, LayerType: kgen, Inputs: [ { Name: x, Datatype: Float }], Constants: [], Outputs: [ { Name: b }], TacticName: t
Name: conv, LayerType: correlation, Inputs: [ { Name: b, Datatype: Int8 }, { Name: c }], Constants: [], Outputs: []
Name: fc, LayerType: gemm, Inputs: [ { Name: b, Datatype: Half }], Constants: [ { Datatype: Half }], Outputs: []
Name: made, LayerType: constant, Inputs: [], Outputs: [ { Name: z, Datatype: Float }]
"""


def build(flavour, tmp_path, **target):
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"onnx")
    return _trt.build_plan(
        flavour, onnx, tmp_path, target=Target(name="t", **target), configure=lambda config: config.set_flag("mine")
    )


@pytest.mark.parametrize(("major", "flags"), [(10, 0b11), (11, 0b10)])
def test_network_flags_are_those_that_the_version_has(fake, major, flags):
    flavour, _ = fake(major)

    assert _trt.network_flags(flavour) == flags


def test_a_version_without_strong_typing_is_refused(fake):
    flavour, _ = fake(8)

    with pytest.raises(
        Unsupported, match=r"TensorRT 8.3.0 has no strongly typed networks; rdeploy needs TensorRT 10.3"
    ):
        _trt.network_flags(flavour)


@pytest.mark.parametrize("major", [10, 11])
def test_a_build_sets_nothing_that_one_of_the_versions_lacks(fake, tmp_path, major):
    flavour, calls = fake(major)

    plan = build(flavour, tmp_path, batch_sizes=(2, 1, 8))

    assert plan.path == tmp_path / "tensorrt.engine"
    assert plan.path.read_bytes() == b"plan"
    flags = {10: 0b11, 11: 0b10}[major]
    assert [call[:2] for call in calls if call[0] != "builder.build_serialized_network"] == [
        ("builder.create_network", flags),
        ("builder.create_builder_config",),
        ("config.profiling_verbosity", "detailed"),
        ("config.set_flag", "mine"),
        ("builder.create_optimization_profile",),
        ("profile.set_shape", "x"),
        ("config.add_optimization_profile", calls[-2][1]),
    ]


def test_a_dynamic_batch_ranges_over_the_targets_batch_sizes_tuned_for_the_first(fake, tmp_path):
    flavour, calls = fake(10)

    build(flavour, tmp_path, batch_sizes=(2, 1, 8))

    assert ("profile.set_shape", "x", (1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8)) in calls


def test_a_static_batch_needs_no_shape_range(fake, tmp_path):
    flavour, calls = fake(10, shape=(1, 3, 8, 8))

    build(flavour, tmp_path)

    assert not any(name.startswith("profile") for name, *_ in calls)


def test_a_dynamic_resolution_is_unsupported(fake, tmp_path):
    flavour, _ = fake(10, shape=(1, 3, -1, -1))

    with pytest.raises(Unsupported, match=r"x: float32 \[1, 3, \?, \?\]: only the first dimension may be dynamic"):
        build(flavour, tmp_path)


def test_a_refused_node_is_named(fake, tmp_path):
    flavour, _ = fake(10, parses=False)

    with pytest.raises(Unsupported) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == "TensorRT refuses node 'n3' (Foo) of model.onnx: some reason"


def test_a_failed_build_says_the_builders_last_error_and_keeps_the_log(fake, tmp_path):
    flavour, _ = fake(10, serialized=None)

    with pytest.raises(StageError) as caught:
        build(flavour, tmp_path)

    assert str(caught.value) == "build: TensorRT cannot build model.onnx: Myelin (no kernel)"
    assert "no kernel" in (tmp_path / "tensorrt.log").read_text()
    assert not (tmp_path / "tensorrt.engine").exists()


def test_options_that_are_not_given_touch_nothing(fake):
    flavour, calls = fake(11)
    config = flavour.trt.Builder(None).create_builder_config()
    calls.clear()

    _trt.set_options(flavour.trt, config, workspace_mb=None, sparse_weights=False, tf32=True)
    assert calls == []

    _trt.set_options(flavour.trt, config, workspace_mb=64, sparse_weights=True, tf32=False)
    assert calls == [
        ("config.set_memory_pool_limit", "workspace", 64 << 20),
        ("config.set_flag", "sparse"),
        ("config.clear_flag", "tf32"),
    ]


def test_kernels_are_read_from_the_build_log():
    kernels = _trt.kernels_in_log([(3, "something"), (4, LAYERS)])

    assert kernels == (("kgen", "Float"), ("correlation", "Int8"), ("gemm", "Half"), ("constant", "Float"))
    assert _trt.count_precisions(kernels) == (("fp16", 1), ("fp32", 1), ("generated", 1), ("int8", 1))


@pytest.mark.parametrize(
    ("major", "counted"), [(10, (("int8", 1),)), (11, (("fp16", 1), ("generated", 1), ("int8", 1)))]
)
def test_kernels_are_read_from_either_shape_of_the_inspectors_json(fake, major, counted):
    flavour, _ = fake(major)
    engine = flavour.trt.Runtime(_trt.logger_of(flavour)).deserialize_cuda_engine(b"plan")

    assert _trt.count_precisions(_trt.kernels_in_engine(flavour, engine)) == counted


def test_a_data_type_that_is_not_known_is_counted_as_other():
    assert _trt.count_precisions([("shape", "Int64"), ("Reformat", "FP16")]) == (("other", 1), ("reorder", 1))


def test_the_planned_memory_is_read_from_the_log():
    log = [(3, "Total Weights Memory: 43652 bytes"), (3, "Total Activation Memory: 8 bytes"), (3, "else")]

    assert _trt.planned_memory(log) == (
        "the builder plans 43652 bytes of weights memory",
        "the builder plans 8 bytes of activation memory",
    )


def test_the_logger_exists_once_and_keeps_warnings_but_not_the_verbose_stream(fake, tmp_path):
    flavour, _ = fake(10)
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
