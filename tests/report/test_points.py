"""The rows that plots and tables are made of."""

import copy
import csv
import io
from dataclasses import replace

import pytest

from rdeploy import runs
from rdeploy.report import points, searched
from rdeploy.report.searched import Outcome


@pytest.fixture
def found(run):
    return points.points(runs.read(run))


def by_id(found):
    return {one.id: one for one in found}


def test_there_is_a_row_for_each_engine_and_the_native_model_comes_first(found):
    assert {one.id for one in found[:2]} == {"native@openvino", "native@onnxruntime"}
    assert len(found) == 2 + 5 * 3
    assert len(by_id(found)) == len(found)


def test_a_row_holds_what_the_manifest_says_in_the_units_of_the_page(found):
    one = by_id(found)["r168-int8@openvino"]

    assert (one.side, one.resolution, one.precision, one.position) == (168, "168", "int8", "input")
    assert (one.p50_ms, one.accuracy, one.accuracy_low, one.accuracy_high) == pytest.approx((2.3, 84, 81, 87))
    assert one.speedup == pytest.approx(5 / 2.3)
    assert one.gmacs == pytest.approx(168 * 168 * 8e-6)
    assert one.status == ""


def test_what_was_not_measured_says_why_and_is_not_on_the_front(found):
    one = by_id(found)["r168-int8@tensorrt_rtx"]

    assert one.status == "built for sm_89"
    assert one.p50_ms is None
    assert one.role == ""


def test_engines_that_were_measured_at_a_batch_are_named_by_it(run):
    bundles = [replace(one, manifest=copy.deepcopy(one.manifest)) for one in runs.read(run)]
    for engine in (engine for one in bundles for engine in one.manifest["engines"] if engine["measurement"]):
        engine["measurement"]["batch"] = 8

    found = by_id(searched.points(bundles, Outcome(pick="r168-int8@openvino-batch8", reason="")))

    assert found["r168-int8@openvino-batch8"].role == "pick"
    assert found["native@openvino-batch8"].batch == 8


def test_the_front_and_the_pick_are_marked(found):
    roles = {one.id: one.role for one in found if one.role}

    assert roles == {
        "native@openvino": "native", "native@onnxruntime": "native", "r112-int8@openvino": "pick",
        "r168-int8@openvino": "front", "r192-int8@openvino": "front", "r224-int8@openvino": "front",
    }  # fmt: skip


def test_csv_and_markdown_hold_every_row(found):
    rows = list(csv.DictReader(io.StringIO(points.to_csv(found))))
    text = points.to_markdown(found, metric="top-1", reason="Because.")

    assert [row["id"] for row in rows] == [one.id for one in found]
    assert float(rows[2]["p50_ms"] or 0) == (found[2].p50_ms or 0)
    assert text.startswith("Because.\n\n| engine | px | p50 ms | speed-up [95 %] | top-1 % [95 %] |")
    assert "| **r112-int8@openvino** | 112 | 1.10 | 4.55 [4.45, 4.64] | 62.0 [59.0, 65.0] |" in text
    assert len(text.splitlines()) == 4 + len(found)


def test_no_bundles_no_points():
    assert points.points(()) == ()
