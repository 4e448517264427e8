"""Which precision to deploy: closed-form cases, and the price of each point of a curve."""

import dataclasses

import pytest

from rdeploy import recommend
from rdeploy.recommend import Candidate
from rdeploy.results import CurvePoint

FP32 = Candidate(precision="fp32", backend="openvino", p50_ms=2.0, drop=0.0)
INT8 = Candidate(precision="int8", backend="openvino", p50_ms=1.0, drop=0.3, speedup=2.0, interval=(1.9, 2.1))


def choose(*candidates, **more):
    return recommend.choose("r168", candidates, **more)


def test_int8_that_is_faster_within_the_budget_is_chosen_with_the_two_numbers():
    found = choose(FP32, INT8, max_drop=0.5)

    assert (found.precision, found.against, found.backend) == ("int8", "fp32", "openvino")
    assert (found.speedup, found.drop) == (2.0, 0.3)
    assert found.reason == "INT8 pays: 2.00x over FP32 [1.90, 2.10] for -0.3 points"


def test_int8_that_does_not_pay_loses_to_fp32():
    slow = dataclasses.replace(INT8, p50_ms=1.96, speedup=1.02, interval=(1.01, 1.03), drop=1.3)

    found = choose(FP32, slow)

    assert (found.precision, found.speedup, found.drop) == ("fp32", 1.02, 1.3)
    assert found.reason == (
        "INT8 does not pay: 1.02x over FP32 [1.01, 1.03] for -1.3 points: FP32 is the better choice"
    )


def test_a_loss_that_nobody_bears_is_refused_without_a_budget_as_well():
    ruined = dataclasses.replace(INT8, drop=35.0)

    found = choose(FP32, ruined, bearable=2.0)

    assert found.precision == "fp32"
    assert found.reason == (
        "INT8 loses 35.0 points, more than the 2 that are bearable without --max-drop, for 2.00x: FP32 is the better choice"
    )
    assert choose(FP32, ruined, bearable=2.0, max_drop=40).precision == "int8"


def test_an_interval_that_holds_1_shows_no_gain():
    unsure = dataclasses.replace(INT8, p50_ms=1.85, speedup=1.08, interval=(0.97, 1.2))

    found = choose(FP32, unsure)

    assert found.precision == "fp32"
    assert found.reason == (
        "INT8 may not pay: 1.08x over FP32 [0.97, 1.20] for -0.3 points, and the interval holds 1: FP32 is the better choice"
    )


def test_what_fp32_was_executed_in_is_named():
    found = choose(dataclasses.replace(FP32, executed="bf16"), INT8)

    assert found.reason == "INT8 pays: 2.00x over FP32 (executed in bf16) [1.90, 2.10] for -0.3 points"


@pytest.mark.parametrize(("speedup", "precision"), [(1.049, "fp32"), (1.05, "int8"), (0.8, "fp32")])
def test_the_line_is_at_five_percent(speedup, precision):
    assert choose(FP32, dataclasses.replace(INT8, speedup=speedup)).precision == precision


def test_int8_beyond_the_budget_loses_to_the_fastest_float():
    fp16 = Candidate(precision="fp16", backend="tensorrt", p50_ms=1.2, drop=0.0, speedup=1.0)

    found = choose(FP32, fp16, dataclasses.replace(INT8, drop=2.34), max_drop=1.0)

    assert (found.precision, found.against) == ("fp16", "fp16")
    assert found.reason == "INT8 loses 2.3 points, more than the 1 allowed, for 2.00x: FP16 is the better choice"


def test_mixed_precision_is_chosen_where_int8_loses_too_much():
    mixed = Candidate(precision="mixed", backend="openvino", p50_ms=1.4, drop=0.0, speedup=1.43)

    found = choose(FP32, dataclasses.replace(INT8, drop=3.0), mixed, max_drop=0.5)

    assert found.precision == "mixed"
    assert found.reason == (
        "mixed precision pays: 1.43x over FP32 without loss; INT8 loses 3.0 points, more than the 0.5 allowed, for 2.00x"
    )


def test_a_gain_has_its_sign_and_an_unknown_drop_is_not_made_up():
    assert choose(FP32, dataclasses.replace(INT8, drop=-0.4)).reason.endswith("for +0.4 points")
    assert choose(FP32, dataclasses.replace(INT8, drop=None), max_drop=0.1).reason.endswith("[1.90, 2.10]")


def test_what_was_not_measured_gets_no_answer_unless_accuracy_gives_one():
    built = Candidate(precision="int8", backend="tensorrt_rtx", drop=0.2)
    fp16 = Candidate(precision="fp16", backend="tensorrt_rtx", drop=0.0)

    assert choose(built, fp16, max_drop=0.5).precision is None
    assert choose(built, fp16).reason == "not measured here, so which precision pays is not known"
    refused = choose(dataclasses.replace(built, drop=2.0), fp16, max_drop=0.5)
    assert (refused.precision, refused.speedup) == ("fp16", None)
    assert refused.reason == "INT8 loses 2.0 points, more than the 0.5 allowed: FP16 is the better choice"


def test_without_a_quantized_engine_the_fastest_float_is_the_answer():
    fp16 = Candidate(precision="fp16", backend="tensorrt", p50_ms=1.5, drop=0.0, speedup=1.0)

    assert choose(FP32, fp16).precision == "fp16"


def test_latency_is_linear_between_the_two_engines_that_were_measured():
    """INT8 alone 1 ms, FP32 3 ms: with 10 % of the MACs in float 1.2 ms were measured."""
    curve = tuple(CurvePoint(layers=n, drop=0.0, float_macs=share) for n, share in ((0, 0.0), (2, 0.1), (5, 0.55)))

    priced = recommend.priced(curve, layers=2, chosen_ms=1.2, float_ms=3.0)

    assert [point.latency_ms for point in priced] == pytest.approx([1.0, 1.2, 2.1])
    assert [point.drop for point in priced] == [0, 0, 0]
