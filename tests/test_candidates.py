"""Which variants may be worth an engine: those that were asked for, and what rules out the others."""

import runpy
from pathlib import Path

from rdeploy import candidates, optimization
from rdeploy.search import Budget

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
candidate, evidence, variant, search_of, record = (
    POINTS[name] for name in ("candidate", "evidence", "variant", "search_of", "Record")
)


def test_a_size_above_the_native_one_rules_out_no_smaller_one(monkeypatch):
    lost = {448: 30.0, 224: 0.0, 192: 5.0, 160: 9.0}
    one = search_of()
    monkeypatch.setattr(
        candidates, "_judged_float", lambda one, v, count: candidate(v.resolution[0], lost[v.resolution[0]])
    )

    judged = list(candidates._judged_downwards(one, [variant(side) for side in lost], 100))

    assert [c.variant.resolution[0] for c in judged] == [448, 224, 192]
    assert one.store.kept["r160-fp32"][1].startswith("not judged: r192-fp32, which is larger")


def test_a_precision_that_is_left_out_makes_no_candidate_and_fp32_is_only_the_native_model():
    floats = [candidate(224, 0), candidate(160, 0)]
    one = search_of(left_out={"fp16": "the target has none"}, store=record(*floats))

    rounded = candidates.rounded(one)
    points = optimization._prospects(one, [*floats, *rounded], [], one.budget).promising()

    assert [c.variant.id for c in rounded] == ["r224-int8", "r160-int8"]
    assert {point.variant.id for point in points} == {"r224-fp32", "r224-int8", "r160-int8"}


def test_the_native_size_has_its_preprocessing_inside_where_that_is_asked_for_but_not_the_native_model():
    one = search_of(store=record(candidate(224, 0)))
    one.this.request.embed_preprocess = True

    assert [c.variant.embeds_preprocessing for c in candidates.rounded(one)] == [True, True]
    assert not one.baseline.variant.embeds_preprocessing


def int8_at(side, drop, ms):
    return evidence(side, drop, ms, precision="int8")


def mixed_of(*measured, budget=None, **facts):
    floats = [candidate(224, 0.2), candidate(160, 0.8), candidate(128, 3)]
    one = search_of(store=record(*floats), budget=budget or Budget(max_drop=1.0))
    one.store.evidence = lambda: measured
    one.this.has_real_images, one.this.spec.task = True, "classification"
    vars(one.this).update(facts)
    return candidates.mixed(one, floats)


def test_where_int8_loses_too_much_and_fp32_does_not_the_worst_layers_may_stay_in_float():
    native, good = evidence(224, 0, 8), evidence(160, 0.8, 5, width=0.1)

    found = mixed_of(native, good, int8_at(224, 2, 4), int8_at(160, 0.9, 3), int8_at(128, 5, 2))

    assert [c.variant.id for c in found] == ["r224-mixed"]
    assert found[0].variant.quant.max_drop == 0.8  # what FP32 leaves of the point
    assert found[0].drop.value == 0.2


def test_layers_in_float_do_not_make_int8_faster_than_the_best():
    assert mixed_of(evidence(224, 0, 8), int8_at(224, 2, 9)) == []


def test_without_a_limit_or_real_images_no_layers_are_looked_for():
    measured = evidence(224, 0, 8), int8_at(224, 2, 4)

    assert len(mixed_of(*measured)) == 1
    assert mixed_of(*measured, budget=Budget()) == []
    assert mixed_of(*measured, has_real_images=False) == []
