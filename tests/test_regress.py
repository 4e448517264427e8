"""Every verdict on every kind of metric, from fabricated snapshots whose outcome follows from their numbers."""

import dataclasses
import math

import pytest

from rdeploy import budgets, regress, verdicts
from rdeploy.snapshot import EngineFacts, Launch, Share, Snapshot, Speedup

RULES = budgets.Rules()
MACHINE = {"host": "a", "cpu": "an EPYC", "cpu_flags": ["avx2"], "threads": 2, "runtimes": {"onnxruntime": "1.30"}}


def launches(latencies_ms, *, peak=50_000_000, build_s=None):
    return tuple(Launch(blocks_ms=((ms,) * 4,) * 4, process_peak_bytes=peak, build_s=build_s) for ms in latencies_ms)


def snapshot(latencies_ms=(), *, machine=MACHINE, counts=None, **facts):
    facts = {"launches": launches(latencies_ms), **facts}
    engine = EngineFacts(backend="onnxruntime", backend_version="1.30", size_bytes=1000, **facts)
    return Snapshot(
        name="net r6-int8", machine=machine, counts={"macs": 100} if counts is None else counts, engines=(engine,)
    )


def finding(metric, current, baseline, rules=RULES, **how):
    (found,) = [one for one in regress.compare(current, baseline, rules, **how) if one.metric == metric]
    return found


BASE_MS = (1.00, 1.02, 0.99, 1.01, 1.00, 0.98)


def scaled(factor, wobble=0.0):
    return [ms * factor * (1 + wobble * (-1) ** i) for i, ms in enumerate(BASE_MS)]


@pytest.mark.parametrize(
    ("factor", "wobble", "verdict"),
    [
        (1.00, 0.002, "pass"),
        (1.20, 0.002, "regression"),
        (0.80, 0.002, "improvement"),
        (1.05, 0.002, "inconclusive"),
        (1.00, 0.2, "inconclusive"),
        (1.20, 0.2, "inconclusive"),
    ],
)
def test_latency_side_by_side(factor, wobble, verdict):
    found = finding("latency", snapshot(scaled(factor, wobble)), snapshot(BASE_MS), paired=True)

    assert found.verdict == verdict
    assert found.interval[0] <= found.change <= found.interval[1]
    assert found.basis == "6 launches side by side"
    if wobble < 0.1:
        assert found.change == pytest.approx(factor - 1, abs=0.001)


def test_pairing_takes_out_a_load_that_hit_both_sides():
    load = (1.0, 3.0, 1.5, 2.0, 8.0, 1.2)
    current = snapshot([ms * x * (1 + 0.001 * (-1) ** i) for i, (ms, x) in enumerate(zip(BASE_MS, load))])

    assert finding("latency", current, snapshot([a * b for a, b in zip(BASE_MS, load)]), paired=True).verdict == "pass"


def test_what_is_inconclusive_says_how_many_launches_would_settle_it():
    current = [1.02 * ms * (1 + 0.02 * (-1) ** i) for i, ms in enumerate(BASE_MS)]

    found = finding("latency", snapshot(current), snapshot(BASE_MS), paired=True)

    assert found.verdict == "inconclusive"
    assert found.reason == f"about {found.needed} more launches would settle it"
    more = math.ceil((6 + found.needed) / 6)
    settled = finding("latency", snapshot(current * more), snapshot(BASE_MS * more), paired=True)
    assert settled.verdict == "pass"


def test_a_change_at_the_budget_is_said_to_be_hopeless():
    found = finding("latency", snapshot(scaled(1.05, 0.01)), snapshot(BASE_MS), paired=True)

    assert found.needed is None
    assert found.reason == "the change is too close to the budget for any sensible number of launches"


def test_a_later_look_spends_less_and_is_wider():
    current, base = snapshot(scaled(1.02, 0.005)), snapshot(BASE_MS)

    once = finding("latency", current, base, paired=True)
    third = finding("latency", current, base, paired=True, looks={"onnxruntime": 3})

    assert third.interval[0] < once.interval[0]
    assert third.interval[1] > once.interval[1]


def test_throughput_falls_where_latency_rises():
    rules = budgets.Rules(budgets=budgets.Budgets(throughput=5.0))

    worse = finding("throughput", snapshot(scaled(1.2, 0.001)), snapshot(BASE_MS), rules, paired=True)
    better = finding("throughput", snapshot(scaled(0.8, 0.001)), snapshot(BASE_MS), rules, paired=True)

    assert (worse.verdict, better.verdict) == ("regression", "improvement")
    assert worse.change == pytest.approx(1 / 1.2 - 1, abs=0.001)
    assert worse.baseline == pytest.approx(1000.0, rel=0.01)


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "pass"), (1.5, "regression"), (0.5, "improvement")])
def test_memory_and_build_time(factor, verdict):
    rules = budgets.Rules(budgets=budgets.Budgets(build_time=5.0))
    base = snapshot(launches=launches(BASE_MS, peak=50_000_000, build_s=2.0))
    current = snapshot(launches=launches(BASE_MS, peak=round(50_000_000 * factor), build_s=2.0 * factor))

    assert finding("memory", current, base, rules, paired=True).verdict == verdict
    assert finding("build_time", current, base, rules, paired=True).verdict == verdict


@pytest.mark.parametrize(
    ("metric", "now", "then", "verdict"),
    [
        ("macs", 100, 100, "pass"),
        ("macs", 101, 100, "regression"),
        ("macs", 99, 100, "improvement"),
        ("onnx_bytes", 1009, 1000, "pass"),
        ("onnx_bytes", 1011, 1000, "regression"),
        ("onnx_bytes", 980, 1000, "improvement"),
        ("nodes", 0, 0, "pass"),
        ("nodes", 1, 0, "regression"),
        ("qdq_coverage", 0.9, 0.9, "pass"),
        ("qdq_coverage", 0.8, 0.9, "regression"),
        ("qdq_coverage", 0.95, 0.9, "improvement"),
    ],
)
def test_counts_are_compared_exactly(metric, now, then, verdict):
    found = finding(metric, snapshot(counts={metric: now}), snapshot(counts={metric: then}))

    assert found.verdict == verdict
    assert (found.current, found.baseline) == (now, then)


def test_a_count_that_was_not_made_here_is_not_comparable():
    found = finding("nodes", snapshot(counts={}), snapshot(counts={"nodes": 95}))

    assert (found.verdict, found.reason) == ("not comparable", "the baseline has 95, it was not counted here")


def test_the_size_of_an_engine_is_exact():
    small, large = snapshot(), snapshot()
    large = dataclasses.replace(large, engines=(dataclasses.replace(large.engines[0], size_bytes=2000),))

    assert finding("size", large, small).verdict == "regression"
    assert finding("size", small, large).verdict == "improvement"


def shares(right, samples, **more):
    return snapshot(accuracy=Share(right=right, samples=samples, **more))


@pytest.mark.parametrize(
    ("right", "verdict"), [(900, "pass"), (700, "regression"), (989, "improvement"), (885, "inconclusive")]
)
def test_accuracy_image_by_image(right, verdict):
    then = shares(900, 1000, per_image="1" * 900 + "0" * 100, images="i")
    now = shares(right, 1000, per_image="1" * right + "0" * (1000 - right), images="i")

    found = finding("accuracy", now, then)

    assert found.verdict == verdict
    assert found.basis == f"1000 images, one by one: {abs(right - 900)} decided differently"
    assert found.change == pytest.approx((right - 900) / 1000)


def test_accuracy_by_totals_assumes_the_most_disagreement():
    one_by_one = shares(90, 100, per_image="1" * 90 + "0" * 10, images="i")
    known = finding("accuracy", one_by_one, one_by_one)
    totals = finding("accuracy", shares(90, 100), shares(90, 100))

    assert totals.interval[1] > known.interval[1]
    assert totals.verdict == "inconclusive"
    assert totals.reason == f"about {totals.needed} more images would settle it"
    assert "--data compares one by one" in totals.basis


def test_accuracy_on_other_images_is_not_comparable():
    found = finding("accuracy", shares(9, 10), shares(18, 20))

    assert found.verdict == "not comparable"
    assert found.reason == "scored on 20 images in the baseline, on 10 here"


OTHER = {**MACHINE, "host": "b", "cpu": "a Xeon", "cpu_flags": ["avx2", "avx512_vnni"]}
BUILT = Speedup(value=2.0, ci95=(1.98, 2.02), memory_ratio=0.8)


def test_another_machine_leaves_ratios_and_counts_to_decide():
    rules = budgets.Rules(budgets=budgets.Budgets(speedup=20.0))
    current, base = snapshot([1.0], machine=OTHER, speedup=BUILT), snapshot([2.0], speedup=BUILT)

    found = {one.metric: one for one in regress.compare(current, base, rules)}

    assert {found["latency"].verdict, found["memory"].verdict} == {"not comparable"}
    assert "host a -> b" in found["latency"].reason
    assert {found["speedup"].verdict, found["macs"].verdict, found["memory_ratio"].verdict} == {"pass"}
    assert regress.notes(current, base) == (
        "another machine: host a -> b, cpu an EPYC -> a Xeon, cpu_flags avx2 -> avx2 avx512_vnni; ratios and counts "
        "decide, absolute times and bytes do not",
        "the CPUs' features differ, and with them what INT8 and BF16 gain: expect other speed-ups",
    )


@pytest.mark.parametrize(("value", "verdict"), [(2.0, "pass"), (1.2, "regression"), (3.5, "improvement")])
def test_the_speed_up_of_two_builds(value, verdict):
    rules = budgets.Rules(budgets=budgets.Budgets(speedup=20.0))
    now = Speedup(value=value, ci95=(value * 0.99, value * 1.01), memory_ratio=0.8)

    found = finding("speedup", snapshot(speedup=now), snapshot(speedup=BUILT), rules)

    assert found.verdict == verdict
    assert (found.current, found.baseline) == pytest.approx((value, 2.0))


def test_one_launch_is_not_enough_for_a_small_budget():
    found = finding("speedup", snapshot(speedup=BUILT), snapshot(speedup=BUILT))

    assert found.verdict == "inconclusive"
    assert found.reason.startswith("--rerun-baseline measures both sides side by side")


def test_a_ratio_from_a_busy_machine_is_compared_and_said():
    found = finding("speedup", snapshot(speedup=BUILT, load=7.4, cores=2), snapshot(speedup=BUILT))

    assert found.verdict != "not comparable"
    assert found.basis.endswith("one launch now, one launch then; load 7.4 on 2 cores now")


def test_launches_beside_the_native_model_need_no_assumption():
    native = launches([2 * ms for ms in BASE_MS])
    current = snapshot(scaled(1.0, 0.001), machine=OTHER, native=native)

    found = finding("speedup", current, snapshot(BASE_MS, native=native))

    assert found.verdict == "pass"
    assert found.basis == "against native in the same run; 6 launches now, 6 launches then"


def test_two_occasions_on_one_machine_are_compared_with_care():
    same = finding("latency", snapshot(BASE_MS), snapshot(BASE_MS))
    twice = finding("latency", snapshot(scaled(2.0)), snapshot(BASE_MS))

    assert same.verdict == "inconclusive"
    assert twice.verdict == "regression"
    assert twice.basis == "6 launches now, 6 launches then, on the same machine"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"load": 7.4, "cores": 2}, "load 7.4 on 2 cores now"),
        ({"threads": 1}, "threads all -> 1"),
        ({"batch": 8}, "batch 1 -> 8"),
        ({"definition": "device clock"}, "latency is 'wall clock' there and 'device clock' here"),
    ],
)
def test_what_was_not_measured_alike_is_not_compared(facts, reason):
    current = snapshot(BASE_MS, **{"definition": "wall clock", **facts})

    found = finding("latency", current, snapshot(BASE_MS, definition="wall clock"))

    assert found.verdict == "not comparable"
    assert reason in found.reason


def test_a_speed_up_with_other_threads_is_another_speed_up():
    found = finding("speedup", snapshot(speedup=BUILT, threads=1), snapshot(speedup=BUILT))

    assert (found.verdict, found.reason) == ("not comparable", "not measured alike: threads all -> 1")


def test_an_engine_that_is_gone_or_refused_is_a_regression():
    gone = dataclasses.replace(snapshot(), engines=())

    assert finding("engine", gone, snapshot()).reason == "the baseline has this engine, the current variant does not"
    refused = finding("engine", snapshot(failure="verification refused it: cosine 0.1"), snapshot())
    assert (refused.verdict, refused.reason) == ("regression", "verification refused it: cosine 0.1")


def test_an_engine_that_was_refused_before_is_no_news():
    refused = snapshot(failure="verification refused it")

    assert "engine" not in {one.metric for one in regress.compare(refused, refused, RULES)}


def test_other_software_is_said_and_compared():
    newer = {**MACHINE, "runtimes": {"onnxruntime": "1.32", "numpy": "2"}}

    assert regress.notes(snapshot(machine=newer), snapshot()) == ("other software: onnxruntime 1.30 -> 1.32",)
    assert finding("latency", snapshot(BASE_MS, machine=newer), snapshot(BASE_MS)).verdict != "not comparable"


@pytest.mark.parametrize(
    ("found", "verdict", "code"),
    [
        (("pass", "regression", "inconclusive"), "regression", 1),
        (("pass", "improvement", "inconclusive"), "inconclusive", 4),
        (("pass", "improvement", "not comparable"), "improvement", 0),
        (("pass", "not comparable"), "pass", 0),
        (("not comparable",), "inconclusive", 4),
        ((), "inconclusive", 4),
    ],
)
def test_the_verdict_on_the_whole(found, verdict, code):
    findings = tuple(verdicts.Finding(metric="latency", verdict=one) for one in found)

    result = verdicts.CheckResult(verdict=verdicts.overall(findings), current="a", baseline="b", findings=findings)

    assert (result.verdict, result.exit_code) == (verdict, code)
