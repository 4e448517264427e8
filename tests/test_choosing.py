"""The choice within a budget and its reason; what a changed decision costs, where labels are few."""

import math
from dataclasses import replace

import pytest

from rdeploy import choosing, relation
from rdeploy.search import Budget, Evidence, Interval, Point
from rdeploy.types import Variant


def interval(value, width=0.5):
    return Interval(value=value, low=value - width, high=value + width)


def evidence(side, drop, ms, *, precision="fp32", backend="openvino", memory=100e6, size=20e6, width=0.5):
    return Evidence(
        point=Point(variant=Variant(resolution=(side, side), precision=precision), backend=backend),
        macs=side * side * 1000,
        drop=interval(drop, width),
        latency_ms=interval(ms, ms * 0.01),
        throughput_ips=1000 / ms,
        memory_bytes=int(memory),
        size_bytes=int(size),
    )


def test_the_pick_is_the_fastest_that_is_surely_within_the_budget():
    points = [evidence(224, 0, 8), evidence(160, 0.4, 4), evidence(128, 0.8, 2), evidence(112, 3, 1)]

    choice = choosing.choose(points, Budget(max_drop=1.0))

    assert choice.pick.point.variant.resolution == (160, 160)  # 128 px: 0.8 + 0.5 may exceed 1.0
    assert choice.second.point.variant.resolution == (224, 224)
    assert choice.reason == ("lowest latency, 4.00 ms, of the 4 points measured; it loses 0.4 points [-0.1, 0.9]")


def test_a_pick_that_is_not_sure_says_so():
    choice = choosing.choose([evidence(128, 0.8, 2)], Budget(max_drop=1.0))

    assert choice.pick is not None
    assert choice.reason.endswith("it is not sure that the loss stays under 1: give more of them")


def test_a_latency_that_may_be_above_the_limit_gives_way_to_one_that_is_surely_below():
    near, below = evidence(224, 0.0, 3.99, size=10e6), evidence(192, 0.0, 3.0)
    budget = Budget(max_latency_ms=4.0, objective="size")

    assert choosing.choose([near, below], budget).pick == below
    alone = choosing.choose([near], budget)
    assert alone.pick == near
    assert alone.reason.endswith(
        "at [3.95, 4.03] ms it is not sure that it stays under 4 ms: measure on a quieter machine"
    )


def test_a_memory_that_is_not_known_is_no_memory_within_the_limit():
    unknown, known = replace(evidence(192, 0.0, 1.0), memory_bytes=None), evidence(224, 0.0, 3.0)

    assert choosing.choose([unknown, known], Budget(max_memory_mb=200.0)).pick == known
    assert choosing.choose([unknown], Budget(max_memory_mb=200.0)).reason.endswith(
        "its memory could not be measured here"
    )


@pytest.mark.parametrize(
    ("objective", "side", "words"),
    [
        ("latency", 128, "lowest latency, 2.00 ms"),
        ("throughput", 128, "highest throughput, 500 images/s"),
        ("memory", 160, "lowest peak memory, 90 MB"),
        ("size", 224, "smallest engine, 5.0 MB"),
    ],
)
def test_the_objective_decides(objective, side, words):
    points = [evidence(224, 0, 8, size=5e6), evidence(160, 0.1, 4, memory=90e6), evidence(128, 0.2, 2)]

    choice = choosing.choose(points, Budget(objective=objective))

    assert choice.pick.point.variant.resolution == (side, side)
    assert choice.reason.startswith(words)


def test_a_budget_that_nothing_satisfies_is_answered_with_the_nearest_and_what_would_help():
    points = [evidence(224, 0, 8), evidence(128, 3, 2)]

    choice = choosing.choose(points, Budget(max_drop=1.0, max_latency_ms=4.0))

    assert choice.pick is None
    assert choice.reason == (
        "no point satisfies the budget: the nearest, r224-fp32@openvino, has 4.00 ms too much latency; "
        "it takes --max-latency-ms 8, or: allow a larger drop, take a faster target, or a smaller network; "
        "the fastest of all, r128-fp32@openvino, takes 2.00 ms, and loses 3.0 points [2.5, 3.5]"
    )


def test_memory_and_size_are_limits_as_well():
    points = [evidence(224, 0, 8, memory=50e6), evidence(128, 0, 2, memory=200e6, size=3e6)]

    assert choosing.choose(points, Budget(max_memory_mb=100)).pick.point.variant.resolution == (224, 224)
    assert choosing.choose(points, Budget(max_size_mb=10)).pick.point.variant.resolution == (128, 128)


def test_without_any_measured_point_there_is_no_pick():
    assert choosing.choose([], Budget()).reason == "no point could be measured"


def counted(side, drop, changed, *, samples=200, width=3.0, ms=1.0):
    """A point whose labels and whose changed decisions are known."""
    return replace(evidence(side, drop, ms, width=width), changed=interval(changed, 1.0), samples=samples)


def test_a_relation_that_holds_exactly_has_only_the_spread_of_its_images():
    found = relation.fit([counted(224, 1.0, 2.0), counted(192, 2.0, 4.0), counted(160, 4.0, 8.0)])

    assert found.slope.value == pytest.approx(0.5)
    half = 1.96 * math.sqrt((1 - 0.25) / (8.0 * 200 / 100))  # at most 16 images changed
    assert found.slope.high - found.slope.value == pytest.approx(half)
    assert found.variants == 3


def test_variants_that_scatter_widen_the_relation():
    exact = relation.fit([counted(224, 1.0, 2.0), counted(192, 2.0, 4.0), counted(160, 4.0, 8.0)])
    loose = relation.fit([counted(224, 3.0, 2.0), counted(192, 0.0, 4.0), counted(160, 4.0, 8.0)])

    assert loose.slope.high - loose.slope.low > exact.slope.high - exact.slope.low


def test_engines_of_one_variant_count_once_and_two_variants_are_no_relation():
    twice = [
        counted(224, 1, 2),
        replace(counted(224, 1, 2), point=Point(variant=Variant(resolution=(224, 224)), backend="x")),
    ]

    assert relation.fit([*twice, counted(192, 2, 4)]) is None


def test_where_labels_are_few_the_relation_decides_and_the_reason_says_so():
    others = [counted(s, 0.25 * c, c, ms=9.0) for s, c in ((224, 4.0), (208, 8.0), (192, 40.0))]
    unsure = counted(160, 0.5, 1.0, width=6.0)  # by its labels between -5.5 and 6.5

    choice = choosing.choose([unsure], Budget(max_drop=1.0), everything=[*others, unsure])

    expected, found = relation.narrower(unsure, [*others, unsure])
    assert expected.high < 1.0
    assert expected.value == pytest.approx(0.25)
    assert choice.pick == unsure
    assert "it is not sure" not in choice.reason
    assert (
        f"labels are few: 0.2 points [{expected.low:.1f}, {expected.high:.1f}] are expected of its 1.0 % of changed decisions, "
        f"at 0.25 [{found.slope.low:.2f}, {found.slope.high:.2f}] points lost for each, fitted on 3 variants"
    ) in choice.reason


def test_many_labels_speak_for_themselves():
    others = [counted(s, 0.25 * c, c) for s, c in ((224, 4.0), (208, 8.0), (192, 40.0))]

    assert relation.narrower(counted(160, 0.5, 1.0, width=0.1), others) is None
    assert relation.narrower(evidence(160, 0.5, 1.0), others) is None
