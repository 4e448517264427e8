import dataclasses

import pytest

from rdeploy import capabilities, targets
from rdeploy.capabilities import Needs
from rdeploy.errors import ConfigError
from rdeploy.types import Target

CNN = Needs(
    opset=17,
    operators=(("Conv", ("stem", "body")), ("Gemm", ("head",))),
    weight_bytes=100 << 20,
    activation_bytes=50 << 20,
)
ANY = Target(name="mine")


def told(needs=CNN, runtime="tensorrt", version="10.3", target=ANY):
    return capabilities.obstacles(needs, capabilities.find(runtime, version), target)


def need(**facts):
    return dataclasses.replace(CNN, **facts)


def dla(tensorrt="10.3", **facts):
    options = {"dla_core": 0, **facts.pop("options", {})}
    known = {"dla_cores": 2, "backend_options": (("tensorrt", tuple(options.items())),), **facts}
    return Target(name="orin", **known), tensorrt


def test_what_came_with_which_release():
    lacking = {entry.title: set(entry.lacks) for entry in capabilities.table()}

    assert lacking["TensorRT 8.5"] - lacking["TensorRT 8.6"] == {"GroupNormalization", "IsInf", "LayerNormalization"}
    assert lacking["TensorRT 8.6"] - lacking["TensorRT 10.3"] == {"CastLike", "DeformConv", "Gelu", "Hardmax", "Mish"}
    windows = {"BlackmanWindow", "HammingWindow", "HannWindow"}
    assert lacking["TensorRT 10.3"] - lacking["TensorRT 10.13"] == {*windows, "STFT"}
    newer = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    assert lacking["TensorRT 10.13"] - lacking["TensorRT 10.16"] == newer
    assert lacking["TensorRT 10.16"] - lacking["TensorRT 11.0"] == {"Swish"}
    assert lacking["TensorRT 11.0"] - lacking["TensorRT 11.4"] == {"DFT"}


def test_every_entry_says_where_it_is_from():
    for entry in capabilities.table():
        assert len(entry.sources) >= 2, entry.title
        assert set(entry.refuses) <= set(capabilities._FORMS)
        assert entry.typing in ("weak", "strong")
        assert entry.dla in ("none", "fp16", "typed")


@pytest.mark.parametrize(
    ("runtime", "version", "entry"),
    [
        ("tensorrt", "8.5.2.2", "TensorRT 8.5"),
        ("tensorrt", "8.6.0", "TensorRT 8.6"),
        ("tensorrt", "8.4", "TensorRT 8.5"),
        ("tensorrt", "10.3.0", "TensorRT 10.3"),
        ("tensorrt", "10.9", "TensorRT 10.3"),
        ("tensorrt", "10.13.3", "TensorRT 10.13"),
        ("tensorrt", "11.3", "TensorRT 11.0"),
        ("tensorrt", "11.4.1", "TensorRT 11.4"),
        ("tensorrt", "12.0", "TensorRT 11.4"),
        ("tensorrt_rtx", "1.7.1.116", "TensorRT-RTX 1.7"),
    ],
)
def test_a_version_has_the_entry_that_is_not_newer_than_it(runtime, version, entry):
    assert capabilities.find(runtime, version).title == entry


def test_a_runtime_that_is_not_in_the_table_is_refused():
    with pytest.raises(ConfigError, match="there are no capabilities of openvino; there are: tensorrt, tensorrt_rtx"):
        capabilities.find("openvino", "1")


@pytest.mark.parametrize("entry", capabilities.table(), ids=lambda entry: entry.title)
def test_a_plain_network_builds_everywhere(entry):
    assert capabilities.obstacles(CNN, entry, ANY) == ()


@pytest.mark.parametrize(
    ("facts", "version", "message"),
    [
        ({"opset": 18}, "8.6", "the graph is opset 18, TensorRT 8.6 reads up to 17: set opset in the profile"),
        (
            {"operators": (("LayerNormalization", ("a", "b", "c", "d", "e")),)},
            "8.5",
            "TensorRT 8.5 has no LayerNormalization (a, b, c and 2 more): TensorRT 8.6 has it",
        ),
        (
            {"operators": (("Unique", ("u",)),)},
            "11.4",
            "TensorRT 11.4 has no Unique (u): write it with other operators",
        ),
        (
            {"forms": (("resize_antialias", ("up",)),)},
            "10.16",
            "TensorRT 10.16 refuses Resize with antialiasing (up): write it",
        ),
        (
            {"dynamic": ("x",)},
            "10.3",
            "only the first dimension may be dynamic, not those of x: export at one resolution",
        ),
        (
            {"zero_points": ("q",), "unsigned": ("q",)},
            "10.3",
            "takes symmetric INT8 only, zero points are not 0 at q: quantize for",
        ),
        ({"unsigned": ("q",)}, "10.3", "takes signed INT8 only, q quantizes to UINT8: quantize for this backend"),
        (
            {"foreign": (("com.microsoft.QuickGelu", ("act",)),)},
            "11.4",
            "TensorRT 11.4 has no com.microsoft.QuickGelu (act), which is not an operator of ONNX: export without",
        ),
        ({"precisions": ("bf16",)}, "8.6", "TensorRT 8.6 takes no BF16: export the model in FP32 or FP16"),
        ({"integer_biases": ("b",)}, "10.3", "takes no INT32 DequantizeLinear (b): leave biases in float"),
    ],
)
def test_what_is_in_the_way_is_told_with_the_way_out(facts, version, message):
    (sentence,) = told(need(**facts), version=version)

    assert message in sentence


def test_all_obstacles_are_told_at_once():
    needs = need(
        opset=20, operators=(("LayerNormalization", ("n",)), ("Gelu", ("g",))), unsigned=("q",), dynamic=("x",)
    )

    sentences = told(needs, version="8.5", target=targets.load("jetson-xavier-jp5"))

    assert len(sentences) == 5


def test_a_device_that_a_version_does_not_know():
    (sentence,) = told(target=Target(name="mine", compute_capabilities=("sm_120",)))

    assert sentence.startswith("TensorRT 10.3 does not build for sm_120, only for sm_70, sm_75, sm_80")
    assert told(target=Target(name="thor", compute_capabilities=("sm_110", "sm_101")), version="10.13") == ()


def test_rtx_builds_for_all_devices_or_for_none():
    pair = Target(name="mine", compute_capabilities=("sm_89", "sm_90"))

    (sentence,) = told(runtime="tensorrt_rtx", version="1.7", target=pair)

    assert sentence.startswith("TensorRT-RTX 1.7 does not build for sm_90, only for sm_75")
    assert told(version="10.3", target=pair) == ()


def test_bf16_needs_ampere():
    (sentence,) = told(need(precisions=("bf16",)), target=targets.load("t4"))

    assert sentence == "sm_75 does not compute in BF16: export the model in FP32 or FP16"
    assert told(need(precisions=("bf16",)), target=targets.load("a100")) == ()


def test_turing_needs_fp16_in_rtx():
    turing = Target(name="mine", compute_capabilities=("sm_75",))

    (sentence,) = told(runtime="tensorrt_rtx", version="1.7", target=turing)

    assert sentence == "TensorRT-RTX 1.7 has no FP32 matrix product on Turing (head): build FP16, or leave sm_75 out"
    assert told(need(precisions=("fp16",)), "tensorrt_rtx", "1.7", turing) == ()
    assert told(version="11.4", target=turing) == ()


def test_memory_is_weights_and_activations_of_the_largest_batch():
    small = Target(name="nano", memory_mb=499, batch_sizes=(1, 8))

    (sentence,) = told(target=small)

    assert sentence == (
        "weights and live activations at batch 8 take 500 MB, nano has 499: a smaller batch or resolution"
    )
    assert told(target=dataclasses.replace(small, memory_mb=500)) == ()


@pytest.mark.parametrize(
    ("target", "precisions", "message"),
    [
        (
            dla("10.3"),
            ("fp32", "int8"),
            "DLA takes no explicit Q/DQ with TensorRT 10.3: build FP16 for DLA, or INT8 for the GPU",
        ),
        (dla("10.16"), ("fp16",), "TensorRT 10.16 has no DLA (10.7 was the last before 11.4.1): leave dla_core out"),
        (dla("11.4"), ("fp32",), "DLA computes in FP16 or INT8, and with TensorRT 11.4 the graph decides: build FP16"),
        (dla("10.3", dla_cores=0), ("fp16",), "orin has 0 DLA cores, so there is no core 0: leave dla_core out"),
        (dla("10.3", batch_sizes=(1, 4)), ("fp16",), "DLA takes no dynamic batch: give the profile one batch size"),
    ],
)
def test_what_dla_cannot_do(target, precisions, message):
    assert told(need(precisions=precisions), version=target[1], target=target[0]) == (message,)


def test_dla_without_fallback_must_know_every_operator():
    target, version = dla(options={"gpu_fallback": False})
    needs = need(operators=(("Conv", ("a",)), ("LayerNormalization", ("n",))), precisions=("fp16",))

    assert told(needs, version=version, target=target) == ("DLA has no LayerNormalization (n): allow gpu_fallback",)


def test_dla_that_can_be_built():
    for version, precisions in (("8.5", ("fp16",)), ("10.3", ("fp32",)), ("11.4", ("fp16", "int8"))):
        assert told(need(precisions=precisions), version=version, target=dla()[0]) == ()
