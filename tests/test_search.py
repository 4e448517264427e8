"""Which candidates are dropped unmeasured, what is tried next, the front, and the choice with its reason."""

import math

import pytest

from rdeploy import search
from rdeploy.search import Budget, Candidate, Evidence, Interval, LatencyModel, Point
from rdeploy.types import Variant


def interval(value, width=0.5):
    return Interval(value=value, low=value - width, high=value + width)


def variant(side, precision="fp32"):
    return Variant(resolution=(side, side), precision=precision)


def candidate(side, drop, *, macs=None, precision="fp32", width=0.5):
    macs = side * side * 1000 if macs is None else macs
    return Candidate(variant=variant(side, precision), macs=macs, drop=interval(drop, width), images=64)


def evidence(side, drop, ms, *, precision="fp32", backend="openvino", macs=None, memory=100e6, size=20e6, width=0.5):
    return Evidence(
        point=Point(variant=variant(side, precision), backend=backend),
        macs=side * side * 1000 if macs is None else macs,
        drop=interval(drop, width),
        latency_ms=interval(ms, ms * 0.01),
        throughput_ips=1000 / ms,
        memory_bytes=int(memory),
        size_bytes=int(size),
    )


def test_a_points_name_says_the_variant_and_the_backend():
    assert Point(variant=variant(168, "int8"), backend="openvino").id == "r168-int8@openvino"


def test_the_sizes_go_down_from_the_native_one_and_keep_its_shape():
    assert search.resolutions((224, 224)) == tuple((s, s) for s in (224, 200, 176, 152, 128, 104))
    assert search.resolutions((512, 512))[:3] == ((512, 512), (480, 480), (448, 448))
    assert search.resolutions((240, 320))[-1] == (96, 128)
    assert search.resolutions((32, 32)) == tuple((s, s) for s in (32, 28, 24, 20, 16))


def test_sizes_go_down_place_by_place():
    stem = [
        Variant(resolution=(224, 224), at="stem", resize_options=(("stem", (("resolution", (side, side)),)),))
        for side in (112, 168)
    ]

    found = search.downwards([variant(112), stem[0], variant(224), stem[1], variant(168)])

    assert [one.id for one in found] == [
        "r224-fp32",
        "r168-fp32",
        "r112-fp32",
        "r224-stem168-fp32",
        "r224-stem112-fp32",
    ]


def test_what_surely_loses_too_much_is_ruled_out_with_the_figures():
    found = search.ruled_out([candidate(224, 0, width=0), candidate(112, 9)], Budget(max_drop=2.0))

    assert found == {"r112-fp32": "loses 9.0 points [8.5, 9.5] on 64 images; at most 2 points were allowed"}


def test_what_may_still_be_within_the_budget_stays():
    assert search.ruled_out([candidate(224, 0), candidate(112, 2.4)], Budget(max_drop=2.0)) == {}


def test_what_costs_more_and_is_surely_worse_is_ruled_out():
    found = search.ruled_out([candidate(224, 0), candidate(192, 3, macs=9e6), candidate(176, 1, macs=8e6)], Budget())

    assert list(found) == ["r192-fp32"]
    assert found["r192-fp32"].startswith("r176-fp32 costs no more (0.01 GMACs, here 0.01) and loses less: 1.0 points")


def test_intervals_that_overlap_rule_nothing_out():
    close = [candidate(224, 0), candidate(192, 1.4, macs=9e6), candidate(176, 1, macs=8e6)]

    assert search.ruled_out(close, Budget()) == {}


def test_precisions_are_not_ruled_out_by_each_other():
    both = [candidate(224, 0), candidate(176, 5, precision="int8"), candidate(176, 1)]

    assert search.ruled_out(both, Budget()) == {}


def test_the_native_variant_is_never_ruled_out():
    assert search.ruled_out([candidate(224, 5, width=0)], Budget(max_drop=1.0)) == {}


def test_a_power_law_is_found_exactly_for_every_precision():
    sides = (224, 192, 160, 128)
    law = {
        "fp32": lambda s: 0.002 * (s * s * 1000) ** 0.8 / 1e3,
        "int8": lambda s: 0.0008 * (s * s * 1000) ** 0.8 / 1e3,
    }
    measured = [evidence(s, 0, f(s), precision=p) for p, f in law.items() for s in sides]

    model = LatencyModel(measured)

    for precision, f in law.items():
        found = model.predict(Point(variant=variant(176, precision), backend="openvino"), 176 * 176 * 1000)
        assert found.value == pytest.approx(f(176), rel=1e-9)
        assert found.high / found.value == pytest.approx(math.exp(0.08))


def test_one_point_is_scaled_by_the_work_and_the_interval_says_that_it_is_a_guess():
    model = LatencyModel([evidence(224, 0, 4.0)])

    found = model.predict(Point(variant=variant(112), backend="openvino"), 112 * 112 * 1000)

    assert found.value == pytest.approx(1.0)
    assert (found.low, found.high) == pytest.approx((math.exp(-0.35), math.exp(0.35)))


def test_a_precision_that_was_not_measured_has_a_wide_interval_and_a_backend_none():
    model = LatencyModel([evidence(224, 0, 4.0)])

    assert model.predict(Point(variant=variant(224, "int8"), backend="openvino"), 224 * 224 * 1000).low < 2.0
    assert model.predict(Point(variant=variant(224), backend="onnxruntime"), 1) is None


def test_a_latency_that_rises_as_the_work_falls_is_taken_for_noise():
    model = LatencyModel([evidence(224, 0, 1.0), evidence(112, 0, 2.0)])

    at = [model.predict(Point(variant=variant(s), backend="openvino"), s * s * 1000).value for s in (224, 112)]

    assert at[0] > at[1]


def test_what_was_never_measured_on_a_backend_comes_first_and_hopeless_points_are_left_out():
    measured = [
        evidence(224, 0.0, 8.0), evidence(192, 0.5, 6.0), evidence(160, 0.9, 4.2),
        evidence(128, 1.0, 2.7), evidence(112, 1.1, 2.1),
    ]  # fmt: skip
    candidates = [candidate(208, 5.0, width=0.1), candidate(144, 0.4)]

    found = search.promising(candidates, ("openvino", "onnxruntime"), measured, Budget())

    assert [point.id for point in found] == ["r208-fp32@onnxruntime", "r144-fp32@onnxruntime", "r144-fp32@openvino"]


def test_points_beyond_the_budget_are_not_tried():
    measured = [evidence(s, 0, s * s / 6272) for s in (224, 192, 160, 128)]
    candidates = [candidate(208, 0), candidate(112, 9)]

    found = search.promising(candidates, ("openvino",), measured, Budget(max_drop=2, max_latency_ms=3))

    assert found == []


def test_points_that_were_measured_are_not_tried_again():
    assert search.promising([candidate(224, 0)], ("openvino",), [evidence(224, 0, 8)], Budget()) == []


def test_the_front_holds_what_nothing_beats_fastest_first():
    points = [evidence(224, 0, 8), evidence(192, 2, 9), evidence(160, 1, 4), evidence(128, 3, 2), evidence(112, 4, 3)]

    assert [one.point.variant.resolution[0] for one in search.front(points)] == [128, 160, 224]


def test_latencies_within_the_noise_are_one_point_the_more_accurate():
    assert [e.drop.value for e in search.front([evidence(160, 1, 4.00), evidence(168, 0.5, 4.08)])] == [0.5]


def test_int8_is_expected_to_lose_at_other_places_what_it_lost_where_it_was_measured():
    candidates = [candidate(s, d) for s, d in ((224, 0), (160, 2))] + [
        candidate(s, d, precision="int8") for s, d in ((224, 0), (160, 2))
    ]
    model = search.QualityModel(candidates, [evidence(224, 3.0, 4.0, precision="int8")])

    assert model.predict(candidates[1]) == candidates[1].drop
    found = model.predict(candidates[3])
    assert (found.value, found.low, found.high) == pytest.approx((5.0, 1.5 + 2.0, 2.5 + 4.0))


def test_without_a_measured_place_the_fp32_loss_is_the_most_that_can_be_hoped_for():
    candidates = [candidate(224, 1), candidate(224, 1, precision="int8")]

    assert search.QualityModel(candidates, []).predict(candidates[1]) == candidates[1].drop


def test_int8_that_gained_somewhere_is_not_expected_to_beat_fp32():
    candidates = [candidate(224, 1), candidate(160, 2), candidate(160, 2, precision="int8")]

    found = search.QualityModel(candidates, [evidence(224, 0.0, 4, precision="int8")]).predict(candidates[2])

    assert (found.value, found.low) == (1.5, 1.5)


def test_int8_that_will_surely_lose_too_much_is_not_built():
    measured = [
        evidence(224, 0, 8),
        evidence(224, 9.0, 4.0, precision="int8"),
        evidence(128, 10, 1.5, precision="int8"),
    ]
    candidates = [candidate(224, 0), candidate(160, 1), candidate(128, 2), candidate(160, 1, precision="int8")]

    found = search.promising(candidates, ("openvino",), measured, Budget(max_drop=5))

    assert "r160-int8@openvino" not in [point.id for point in found]


def test_where_memory_or_size_count_a_slower_point_is_still_tried():
    measured = [evidence(s, 0, s * s / 6272) for s in (224, 192, 160, 128)]
    slower = [candidate(208, 3.0, width=0.1)]

    assert search.promising(slower, ("openvino",), measured, Budget()) == []
    assert len(search.promising(slower, ("openvino",), measured, Budget(objective="size"))) == 1
    assert len(search.promising(slower, ("openvino",), measured, Budget(max_memory_mb=100))) == 1
