"""What is said before anything is built: closed-form graphs and made-up machines."""

import dataclasses
from types import SimpleNamespace

import pytest

from rdeploy import expectations, hardware, preflight
from rdeploy.types import Target

CPU = Target(name="cpu", backends=("onnxruntime", "openvino"))
RTX = Target(name="rtx", backends=("tensorrt_rtx", "onnxruntime"), precisions=("fp32", "fp16", "int8"))


def test_fp16_is_for_backends_that_compute_in_it_where_the_profile_lists_it():
    assert expectations.no_fp16(RTX) is None
    assert expectations.computes_fp16(RTX, "tensorrt_rtx")
    assert not expectations.computes_fp16(RTX, "onnxruntime")
    assert expectations.no_fp16(dataclasses.replace(RTX, precisions=("fp32", "int8"))) == (
        "the profile of target rtx does not list fp16 under precisions"
    )


IN_BF16 = "OpenVINO executes the FP32 variant in bf16 on this CPU where that is faster, and says so"


@pytest.mark.parametrize(
    ("flags", "backends", "instead"),
    [
        ({"avx2", "avx512_bf16"}, CPU.backends, IN_BF16),
        ({"avx2", "amx_bf16"}, CPU.backends, IN_BF16),
        ({"avx512_bf16"}, ("onnxruntime",), "FP32 is what would be executed"),
        ({"avx2"}, CPU.backends, "FP32 is what would be executed, since this CPU has no bf16"),
    ],
)  # fmt: skip
def test_on_a_cpu_the_answer_is_what_would_be_executed(flags, backends, instead):
    target = dataclasses.replace(CPU, backends=backends)

    assert expectations.no_fp16(target, flags=flags) == (
        f"FP16 does not pay on target cpu: {', '.join(backends)} compute FP16 graphs in FP32, with casts around it; {instead}"
    )


@pytest.mark.parametrize(
    ("backend", "tensorrt", "rest", "mixed"),
    [
        ("tensorrt", "10.3", "fp16", True),
        ("tensorrt", "10.3", "fp32", False),
        ("tensorrt", "8.5", "fp16", False),  # parses up to opset 17, and FP16 scales came with 19
        ("tensorrt_rtx", None, "fp16", True),
        ("openvino", None, "fp16", False),
    ],
)
def test_the_rest_of_an_int8_graph_is_fp16_where_the_runtime_takes_it(backend, tensorrt, rest, mixed, monkeypatch):
    monkeypatch.setattr(preflight, "version", lambda name, target: target.tensorrt or "1.7")
    target = dataclasses.replace(RTX, backends=(backend,), tensorrt=tensorrt, int8_rest=rest)

    assert expectations.mixes_int8_with_fp16(target, backend) is mixed


def said(flags=(), *, x86=True, target=CPU, precisions=("int8",), **work):
    return expectations.expect(SimpleNamespace(**{**NOTHING, **work}), target, precisions, flags=set(flags), x86=x86)


NOTHING = {"macs": 1_000_000, "depthwise": 0.0, "attention": 0.0, "narrow": 0.0, "tokens": 0}


@pytest.mark.parametrize(
    ("flags", "x86", "expected"),
    [
        ({"avx2"}, True, "this CPU has neither VNNI nor AMX: INT8 weights get 7 bits, and the gain over FP32 is small"),
        ({"avx_vnni"}, True, "this CPU has VNNI: expect INT8 at 1.3 to 1.7 times the speed of FP32"),
        ({"avx512_vnni", "amx_int8"}, True, "this CPU has AMX: INT8 matrix products run at twice the rate of bf16"),
        ({"asimddp"}, False, "this CPU has INT8 dot products"),
        ({"asimddp", "i8mm"}, False, "this CPU has INT8 i8mm"),
        (set(), False, "this CPU has no INT8 dot products: INT8 may not pay"),
    ],
)
def test_what_the_cpu_promises_for_int8(flags, x86, expected):
    (sentence,) = said(flags, x86=x86)

    assert sentence.startswith(expected)


@pytest.mark.parametrize(
    ("name", "there"),
    [("sm_53", False), ("sm_61", False), ("sm_70", False), ("sm_72", True), ("sm_75", True), ("sm_90", True), ("sm_120", True)],
)  # fmt: skip
def test_int8_tensor_cores_by_compute_capability(name, there):
    assert expectations.has_int8_tensor_cores(name) is there
    target = dataclasses.replace(CPU, backends=("tensorrt",), compute_capabilities=(name,))
    assert any(name in sentence for sentence in said(target=target)) is not there


def test_rtx_documents_int8_for_weights_only():
    assert said(target=RTX) == (
        "TensorRT-RTX documents INT8 for the weights of matrix products only: a smaller engine, no promise of speed",
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("onnxruntime_cuda",), ["ONNX Runtime's CUDA provider has no INT8 kernels"]),
        (("torch", "torch_compile"), ["INT8 is not executed by torch, torch_compile"]),
        (("onnxruntime_cuda", "torch"), ["ONNX Runtime's CUDA provider has no INT8 kernels", "INT8 is not executed by torch"]),
        (("onnxruntime_cuda", "openvino"), ["ONNX Runtime's CUDA provider has no INT8 kernels", "this CPU has VNNI"]),
    ],
)  # fmt: skip
def test_what_runs_on_a_gpu_gets_no_promise_of_the_cpu(names, expected):
    found = said({"avx512_vnni"}, target=dataclasses.replace(CPU, backends=names))

    assert [sentence.split(":")[0] for sentence in found] == expected


def test_what_the_graph_promises():
    found = said({"avx_vnni"}, depthwise=0.28, narrow=0.2, attention=0.15, tokens=577)[1:]

    assert [sentence.split(":")[0] for sentence in found] == [
        "28% of the MACs are depthwise convolutions",
        "20% of the MACs are in layers of fewer than 16 channels, which fill no tile of an INT8 unit",
        "15% of the MACs multiply two activations (attention) and stay in float, but for queries x keys on OpenVINO where they "
        "cost little",
    ]
    assert said({"avx_vnni"}, depthwise=0.1, narrow=0.1, attention=0.1)[1:] == ()


@pytest.mark.parametrize(("tokens", "told"), [(512, False), (513, True)])
def test_long_sequences_matter_to_tensorrt(tokens, told, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    target = dataclasses.replace(CPU, backends=("tensorrt",))

    assert (
        any(f"attention runs over {tokens} tokens" in sentence for sentence in said(target=target, tokens=tokens))
        is told
    )


def test_fp16_on_a_cpu_is_told_before_anything_is_built_and_fp32_needs_no_word():
    assert said({"avx2"}, precisions=("fp16",)) == (expectations.no_fp16(CPU, flags={"avx2"}),)
    assert said({"avx2"}, precisions=("fp32",)) == ()
