"""The rows of a run that a search made: its pick and its front stand."""

import pytest

from rdeploy import runs
from rdeploy.report import charts, points, searched
from rdeploy.report.searched import Outcome, Seen
from rdeploy.types import Variant


def seen(side, drop, precision="fp32", **known):
    variant = Variant(resolution=(side, side), precision=precision)
    return Seen(variant=variant, drop=drop, macs=1e9, **known)


def measured(side, drop, ms, precision="fp32", backend="openvino", **known):
    return seen(side, drop, precision, latency_ms=ms, memory_bytes=9e7, size_bytes=2e7, backend=backend, **known)


def roles(found):
    return {one.id: one.role for one in found if one.role}


def test_the_pick_and_the_front_are_the_searchs_own(run):
    outcome = Outcome(pick="r168-int8@openvino", reason="", front=("r168-int8@openvino", "r192-int8@openvino"))

    assert roles(searched.points(runs.read(run), outcome)) == {
        "native@openvino": "native", "native@onnxruntime": "native", "r168-int8@openvino": "pick", "r192-int8@openvino": "front",
    }  # fmt: skip


def test_without_a_pick_nothing_is_marked_as_one(run):
    found = searched.points(runs.read(run), Outcome(pick=None, reason="no point satisfies the budget"))

    assert "pick" not in roles(found).values()


def test_without_a_search_it_is_the_fastest_of_the_front(run):
    bundles = runs.read(run)

    assert searched.points(bundles, None) == points.points(bundles)


def test_the_native_model_is_one_row_under_one_name_also_as_the_pick(run, native_bundle):
    outcome = Outcome(pick="r224-fp32@openvino", reason="", front=("r112-int8@openvino", "r224-fp32@openvino"))

    found = searched.points(runs.read(run), outcome)

    assert roles(found)["native@openvino"] == "pick"
    assert len(found) == 2 + 5 * 3
    assert {one.id for one in found if one.on_front} == {"native@openvino", "r112-int8@openvino"}


def test_the_native_models_bundle_alone_is_a_run(native_bundle):
    found = searched.points(runs.read(native_bundle), Outcome(pick="r224-fp32@openvino", reason=""))

    assert {(one.id, one.role, one.accuracy) for one in found} == {
        ("native@openvino", "pick", 90),
        ("native@onnxruntime", "native", 90),
    }


def test_alone_and_without_labels_the_native_model_agrees_with_itself(native_bundle):
    (bundle,) = runs.read(native_bundle)
    for engine in bundle.manifest["engines"]:
        engine["verification"] = {"passed": True}

    assert points.metric([bundle]) == "agreement with native"
    assert {one.accuracy for one in searched.points([bundle], Outcome(pick=None, reason=""))} == {100}


def test_what_was_measured_and_has_no_bundle_stands_where_its_speed_up_puts_it(run):
    told = (measured(224, 0, 10), measured(144, 4, 4, "int8"), measured(168, 6, 4.6, "int8"))
    outcome = Outcome(pick="r168-int8@openvino", reason="", front=("r168-int8@openvino",), measured=told)

    found = {one.id: one for one in searched.points(runs.read(run), outcome)}

    one = found["r144-int8@openvino"]
    assert (one.p50_ms, one.speedup, one.accuracy, one.status) == (5.0 / 2.5, 2.5, 86, "no bundle")
    assert (one.peak_mb, one.size_mb, one.gmacs) == (90, 20, 1)
    assert found["r168-int8@openvino"].p50_ms == 2.3  # the bundle's own
    assert "r224-fp32@openvino" not in found


def test_where_the_native_model_was_not_measured_a_latency_is_as_it_was(run):
    outcome = Outcome(pick=None, reason="", measured=(measured(144, 4, 4, backend="reference"),))

    one = searched.points(runs.read(run), outcome)[-1]

    assert (one.id, one.p50_ms, one.speedup) == ("r144-fp32@reference", 4, None)


def test_the_plot_has_all_points_and_a_line_through_the_searchs_front(run):
    told = (measured(224, 0, 10), measured(144, 4, 4, "int8"))
    outcome = Outcome(
        pick="r168-int8@openvino", reason="", front=("r168-int8@openvino", "r224-fp32@openvino"), measured=told
    )

    spec = charts.pareto(searched.points(runs.read(run), outcome), metric="top-1")

    drawn = {one["id"]: one for one in spec["data"]["values"]}
    assert drawn["r144-int8@openvino"]["status"] == "no bundle"
    assert "status" in {one["field"] for one in spec["layer"][2]["encoding"]["tooltip"]}
    line = spec["layer"][0]["data"]["values"]
    assert {one["x_ms"] for one in line} == {drawn["r168-int8@openvino"]["x_ms"], drawn["native@openvino"]["x_ms"]}


def test_points_of_different_batches_are_compared_by_the_time_of_one_image(run):
    outcome = Outcome(pick=None, reason="", measured=(measured(144, 4, 40, "int8", batch=8),))

    spec = charts.pareto(searched.points(runs.read(run), outcome), metric="top-1")

    assert {one["id"]: one["x_ms"] for one in spec["data"]["values"]}["r144-int8@openvino-batch8"] == 5
    assert spec["layer"][2]["encoding"]["x"]["title"] == "median latency of one image, ms"


def test_sizes_that_were_judged_alone_are_on_the_ladder(native_bundle):
    bundles = runs.read(native_bundle)
    outcome = Outcome(pick=None, reason="", judged=(seen(224, 0, images=64), seen(168, 3, images=64)))
    found = searched.points(bundles, outcome)

    assert charts.ladder(found, metric="top-1") is None
    made = charts.charts(bundles, found, judged=searched.judged(bundles, outcome), metric="top-1")
    assert {(one["side"], one["accuracy"]) for one in made["ladder"]["data"]["values"]} == {(224, 90), (168, 87)}


@pytest.mark.parametrize(
    "told", [3, {}, {"point": {}}, {"variant": {"resolution": [8]}, "drop": {"value": None}, "macs": 1}]
)
def test_an_entry_that_is_damaged_is_left_out(told):
    assert searched.seen(told) is None
