"""The rows of a run that a search made: its pick and its front stand."""

from rdeploy import runs
from rdeploy.report import points, searched
from rdeploy.report.searched import Outcome


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
