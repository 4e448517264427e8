"""Real TensorRT-RTX builds, ahead of time, on whatever machine the tests run."""

import json
import re

import numpy as np
import pytest

from rdeploy import hardware
from rdeploy.backends import openvino, tensorrt_rtx
from rdeploy.errors import MissingDependency, StageError, Unsupported
from rdeploy.types import QuantScheme, Target

needs_rtx = pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))


def build(onnx, folder, *capabilities, **options):
    target = Target(name="mine", compute_capabilities=capabilities)
    return tensorrt_rtx.build_engine(onnx, folder, target=target, options=tensorrt_rtx.Options(**options))


def weights_bytes(engine):
    return int(re.search(r"plans (\d+) bytes of weights", " ".join(engine.notes))[1])


@needs_rtx
def test_one_engine_holds_several_compute_capabilities(tiny, tmp_path):
    engine = build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_86", "sm_89", "sm_120")

    assert engine.path == "tensorrt_rtx.engine"
    assert engine.built_for == ("sm_86", "sm_89", "sm_120")
    assert "Engine generation completed" in (tmp_path / "e" / "tensorrt_rtx.log").read_text()


@needs_rtx
def test_the_kernels_are_listed_for_machines(tiny, tmp_path):
    engine = build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_89")

    layers = json.loads((tmp_path / "e" / "tensorrt_rtx.layers.json").read_text())["Layers"]
    assert len(layers) == sum(count for _, count in engine.executed_precision) > 0
    assert all(layer["Name"] and layer["LayerType"] for layer in layers)


@needs_rtx
def test_every_batch_size_can_have_a_profile_tuned_for_it(tiny, tmp_path):
    onnx = tiny["write"](tmp_path / "m.onnx", batch="n")
    target = Target(name="mine", compute_capabilities=("sm_89",), batch_sizes=(1, 8))

    one, each = (
        tensorrt_rtx.build_engine(
            onnx, tmp_path / str(split), target=target, options=tensorrt_rtx.Options(profile_per_batch=split)
        )
        for split in (False, True)
    )

    assert each.size_bytes > 1.1 * one.size_bytes  # kernels for two profiles


@needs_rtx
@pytest.mark.parametrize(
    "options",
    [{"version_compatible": True}, {"optimization_level": 0}, {"tf32": False}, {"workspace_mb": 1024}],
    ids=str,
)
def test_options_that_need_no_gpu_build_here(tiny, tmp_path, options):
    engine = build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_89", **options)

    assert engine.size_bytes > 10_000
    assert dict(engine.fingerprint)["version_compatible"] is bool(options.get("version_compatible"))


@needs_rtx
def test_the_workspace_limit_is_a_limit(tiny, tmp_path):
    with pytest.raises(StageError) as caught:
        build(tiny["write"](tmp_path / "m.onnx", channels=64), tmp_path / "e", "sm_89", workspace_mb=1)

    assert "no tactics to implement the operation within workspace limit" in str(caught.value)
    assert str(caught.value).endswith("(allow more with backend_options: workspace_mb, or leave it out)")


@needs_rtx
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_engines_that_can_be_refitted_say_that_they_need_a_driver(tiny, tmp_path, option):
    if hardware.gpus():
        pytest.skip("there is a GPU here")

    with pytest.raises(StageError) as caught:
        build(tiny["write"](tmp_path / "m.onnx", channels=64), tmp_path / "e", "sm_89", **{option: True})

    hint = "(engines that can be refitted, or hold no weights, need a GPU and its driver when they are built)"
    assert str(caught.value).endswith(hint)
    assert not list((tmp_path / "e").glob("*.engine*"))


@needs_rtx
def test_a_bf16_input_is_unsupported_in_words(tiny, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")

    with pytest.raises(Unsupported, match="TensorRT-RTX: the tensor 'x' is BF16, a type that NumPy does not have; exp"):
        build(tmp_path / "m.onnx", tmp_path / "e", "sm_89")


@needs_rtx
def test_sparse_weights_are_allowed_and_the_builders_silence_is_told(tiny, tmp_path):
    engine = build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_89", sparse_weights=True)

    assert engine.notes[-1].startswith("sparse_weights was set; the builder did not say")


@needs_rtx
def test_without_a_gpu_and_a_wish_it_is_built_from_ampere_on(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(hardware, "gpus", lambda: ())

    engine = build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e")

    assert {"sm_80", "sm_86", "sm_89", "sm_120"} <= set(engine.built_for)
    assert "sm_75" not in engine.built_for


@needs_rtx
def test_int8_weights_stay_int8_in_the_engine(tiny, tmp_path):
    scheme = tensorrt_rtx.scheme(Target(name="t"))
    plain = build(tiny["write"](tmp_path / "a.onnx", channels=64), tmp_path / "a", "sm_89")
    quantized = build(tiny["write"](tmp_path / "b.onnx", channels=64, scheme=scheme), tmp_path / "b", "sm_89")

    assert weights_bytes(quantized) < 0.35 * weights_bytes(plain)
    assert dict(quantized.executed_precision)["int8"] == 3  # two convolutions and the Gemm
    assert "int8" not in dict(plain.executed_precision)


@needs_rtx
def test_the_scheme_of_a_cpu_runtime_is_refused_by_the_name_of_the_node(tiny, tmp_path):
    scheme = QuantScheme(name="cpu", activations="uint8", ops=openvino.OPS)

    with pytest.raises(Unsupported) as caught:
        build(tiny["write"](tmp_path / "m.onnx", scheme=scheme), tmp_path / "e", "sm_89")

    message = str(caught.value)
    assert message.startswith("TensorRT-RTX refuses node ")
    assert "(QuantizeLinear) of m.onnx: Non-zero zero point is not supported" in message
    assert message.endswith("(TensorRT takes symmetric INT8 only: quantize for this backend, not for a CPU runtime)")


@needs_rtx
def test_unsigned_int8_with_zero_point_0_is_not_taken_for_signed(tiny, tmp_path):
    import onnx
    from onnx import numpy_helper

    scheme = tensorrt_rtx.scheme(Target(name="t"))
    model = onnx.load(tiny["write"](tmp_path / "m.onnx", scheme=scheme))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_zero") and not tensor.dims:
            tensor.CopyFrom(numpy_helper.from_array(np.uint8(0), tensor.name))
    onnx.save(model, tmp_path / "unsigned.onnx")

    with pytest.raises(
        Unsupported, match=r"would take node 'x_q0_node' of unsigned.onnx for signed INT8; quantize for"
    ):
        build(tmp_path / "unsigned.onnx", tmp_path / "e", "sm_89")


@needs_rtx
def test_a_quantized_bias_is_refused_with_the_way_out(tiny, tmp_path):
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(tiny["write"](tmp_path / "m.onnx"))
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    integers = (numpy_helper.to_array(bias) * 1000).astype(np.int32)
    model.graph.initializer.remove(bias)
    model.graph.initializer.append(numpy_helper.from_array(integers, "bias_q"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "bias_scale"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["bias_q", "bias_scale"], ["bias"], name="bias_dq"))
    onnx.save(model, tmp_path / "bias.onnx")

    with pytest.raises(Unsupported) as caught:
        build(tmp_path / "bias.onnx", tmp_path / "e", "sm_89")

    assert "'bias_dq' (DequantizeLinear)" in str(caught.value)
    assert str(caught.value).endswith("(TensorRT takes no INT32 DequantizeLinear: leave the biases in floating point)")


@needs_rtx
def test_a_gpu_that_this_version_does_not_know_is_refused_with_those_it_knows(tiny, tmp_path):
    with pytest.raises(Unsupported) as caught:
        build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_90")

    assert "does not build for sm_90 (target 'mine'); it knows sm_75, sm_80, sm_86, sm_89" in str(caught.value)
    assert str(caught.value).endswith("use the backend tensorrt on that GPU")


@needs_rtx
def test_turing_says_that_it_needs_fp16(tiny, tmp_path):
    with pytest.raises(StageError) as caught:
        build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_75")

    assert "FP32 GEMM is not supported" in str(caught.value)
    assert str(caught.value).endswith("build FP16, or leave sm_75 out)")


@needs_rtx
def test_a_build_after_a_failed_one_has_its_own_log(tiny, tmp_path):
    onnx = tiny["write"](tmp_path / "m.onnx")
    with pytest.raises(StageError):
        build(onnx, tmp_path / "turing", "sm_75")

    engine = build(onnx, tmp_path / "ada", "sm_89")

    assert "not supported" in (tmp_path / "turing" / "tensorrt_rtx.log").read_text()
    assert "not supported" not in (tmp_path / "ada" / "tensorrt_rtx.log").read_text()
    assert engine.executed_precision


@needs_rtx
def test_loading_an_engine_without_a_driver_says_so(tiny, tmp_path):
    if hardware.gpus():
        pytest.skip("there is a GPU here")
    engine = build(tiny["write"](tmp_path / "m.onnx"), tmp_path / "e", "sm_89")

    reason = tensorrt_rtx.cannot_run(engine)

    assert reason == (
        "running a TensorRT-RTX engine for sm_89 needs an NVIDIA GPU and its driver, and there is none here"
    )
    with (
        pytest.raises(MissingDependency, match="needs an NVIDIA GPU and its driver"),
        tensorrt_rtx.open_session(tmp_path / "e" / engine.path),
    ):
        pass


def test_an_absent_package_names_the_two_wheels(monkeypatch):
    monkeypatch.setattr(tensorrt_rtx, "_MODULES", ("no_such_tensorrt_rtx",))

    assert tensorrt_rtx.unavailable() == (
        "TensorRT-RTX is not installed here; install it with: "
        "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
    )


def test_notes_tell_what_is_not_in_the_engine(monkeypatch, fake, tmp_path):
    flavour, _ = fake("rtx")
    monkeypatch.setattr(tensorrt_rtx, "_flavour", lambda: flavour)
    (tmp_path / "m.onnx").write_bytes(b"onnx")

    engine = build(tmp_path / "m.onnx", tmp_path / "e", "sm_89", strip_weights=True)

    assert engine.notes == (
        "no layer is listed: the builder named none in its log",
        "weights were stripped: they are put back from model.onnx when the engine is opened",
    )
    assert (tmp_path / "e" / "tensorrt_rtx.engine.refit").is_file()
