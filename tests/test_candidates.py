"""Which variants may be worth an engine: those that were asked for, and what rules out the others."""

import runpy
from pathlib import Path

from rdeploy import candidates, optimization

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
candidate, variant, search_of, record = (POINTS[name] for name in ("candidate", "variant", "search_of", "Record"))


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
