"""What is read from the builder's log and from the engine: kernels, precisions, sparsity, planned memory."""

import pytest

from rdeploy.backends import _trt, _trt_report

LAYERS = """Layers:
Name: a, LayerType: kgen, Inputs: [ { Name: x, Datatype: Float }], Constants: [], Outputs: [ { Name: b }], TacticName: t
Name: conv, LayerType: correlation, Inputs: [ { Name: b, Datatype: Int8 }, { Name: c }], Constants: [], Outputs: []
Name: fc, LayerType: gemm, Inputs: [ { Name: b, Datatype: Half }], Constants: [ { Datatype: Half }], Outputs: []
Name: made, LayerType: constant, Inputs: [], Outputs: [ { Name: z, Datatype: Float }]
"""
PICKED = "(Sparsity) TRT inference plan picked sparse implementation for layers:"
FOUND, CHOSE = (
    "(Sparsity) Found {} layer(s) eligible to use sparse tactics",
    "(Sparsity) Chose {} layer(s) using sparse tactics",
)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ([], "sparse_weights was set; the builder did not say whether any layer's weights are 2:4 sparse"),
        (
            ["(Sparsity) Layers eligible for sparse math: a, b, c", f"{PICKED} b"],
            "sparse_weights: 3 layers have 2:4 sparse weights, 1 run sparse kernels: b",
        ),
        (
            ["(Sparsity) Layers eligible for sparse math: ", PICKED],
            "sparse_weights: 0 layers have 2:4 sparse weights, 0 run sparse kernels",
        ),
        (
            [f"{FOUND.format(39)}: a, b", f"{CHOSE.format(2)}: a, b"],
            "sparse_weights: 39 layers have 2:4 sparse weights, 2 run sparse kernels: a, b",
        ),
        (
            [FOUND.format(39), CHOSE.format(0)],
            "sparse_weights: 39 layers have 2:4 sparse weights, 0 run sparse kernels",
        ),
        (  # once a pass of the builder: the last one made the engine
            [FOUND.format(39), f"{CHOSE.format(7)}: a", FOUND.format(12), CHOSE.format(1)],
            "sparse_weights: 12 layers have 2:4 sparse weights, 1 run sparse kernels",
        ),
    ],
)
def test_whether_sparse_kernels_were_chosen_is_told(log, said):
    assert _trt_report.sparsity([(3, line) for line in log]) == said


@pytest.mark.parametrize("log", [[], [(3, FOUND.format(2)), (3, CHOSE.format(1))]])
def test_kernels_that_are_sparse_by_name_are_counted(log):
    tactics = ("sm80_xmma_fprop_sparse_conv_i8i8", "sm80_xmma_fprop_implicit_gemm_f16f16", "sm90_spmma_gemm")
    layers = [*({"Name": "conv", "TacticName": tactic} for tactic in tactics), {"Name": "reformat"}]

    said = _trt_report.sparsity(log, layers)

    assert said.endswith("; 2 of 3 kernels in the engine are sparse ones by their names")


def test_kernels_are_read_from_the_build_log():
    kernels = _trt_report.kernels(_trt_report.layers_in_log([(3, "something"), (4, LAYERS)]))

    assert kernels == (("kgen", "Float"), ("correlation", "Int8"), ("gemm", "Half"), ("constant", "Float"))
    assert _trt_report.count_precisions(kernels) == (("fp16", 1), ("fp32", 1), ("generated", 1), ("int8", 1))


@pytest.mark.parametrize(
    ("version", "counted"), [("10.3", (("int8", 1),)), ("11.4", (("fp16", 1), ("generated", 1), ("int8", 1)))]
)
def test_kernels_are_read_from_either_shape_of_the_inspectors_json(fake, version, counted):
    flavour, _ = fake(version)
    engine = flavour.trt.Runtime(_trt.logger_of(flavour)).deserialize_cuda_engine(b"plan")

    assert (
        _trt_report.count_precisions(_trt_report.kernels(_trt_report.layers_in_engine(flavour.trt, engine))) == counted
    )


def test_a_data_type_that_is_not_known_is_counted_as_other():
    assert _trt_report.count_precisions([("shape", "Int64"), ("Reformat", "FP16")]) == (("other", 1), ("reorder", 1))


def test_the_planned_memory_is_read_from_the_log():
    log = [(3, "Total Weights Memory: 43652 bytes"), (3, "Total Activation Memory: 8 bytes"), (3, "else")]

    assert _trt_report.planned_memory(log) == (
        "the builder plans 43652 bytes of weights memory",
        "the builder plans 8 bytes of activation memory",
    )
