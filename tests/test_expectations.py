"""What is said before anything is built: closed-form graphs and made-up machines."""

import dataclasses

import pytest

from rdeploy import expectations, preflight
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


@pytest.mark.parametrize(
    ("flags", "backends", "instead"),
    [
        ({"avx2", "avx512_bf16"}, CPU.backends, "OpenVINO executes the FP32 variant in bf16 on this CPU by itself, and says so"),
        ({"avx2", "amx_bf16"}, CPU.backends, "OpenVINO executes the FP32 variant in bf16 on this CPU by itself, and says so"),
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
