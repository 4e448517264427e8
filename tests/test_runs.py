"""Reading a run: what is a bundle, what is left out, what is refused."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from rdeploy import bundle, runs, serde
from rdeploy.errors import ConfigError
from rdeploy.report.searched import Outcome

POINTS = runpy.run_path(str(Path(__file__).parent / "points.py"))
candidate, evidence = POINTS["candidate"], POINTS["evidence"]


def test_the_bundles_of_a_folder_come_by_name_with_their_raw_latencies(written):
    (written.parent / "other").mkdir()

    (found,) = runs.read(written.parent)

    assert found.folder == written.name
    assert found.manifest["variant"]["id"] == "r6-int8"
    assert set(found.latencies_ms) == {"openvino", "onnxruntime"}
    assert len(found.baseline_ms["openvino"]) == 200


def test_one_bundle_is_a_run(written):
    assert [one.folder for one in runs.read(written)] == [written.name]


@pytest.mark.parametrize("name", ["nothing", "."])
def test_where_there_is_no_bundle_it_says_what_writes_one(tmp_path, name):
    with pytest.raises(
        ConfigError, match="no bundle here and none in it; `rdeploy build` and `rdeploy optimize` write"
    ):
        runs.read(tmp_path / name)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"engines": {"openvino": {"latencies_ms": ["x"]}}}', "[" * 100_000]
)
def test_raw_latencies_that_are_damaged_are_left_out(written, content):
    (written / "measurements.json").write_text(content)

    (found,) = runs.read(written)

    assert found.latencies_ms == {}


def test_only_pictures_in_base64_are_taken(written):
    entry = {"name": "a", "native": "x", "variant": "y"}
    entries = [{**entry, "jpeg": "aGVsbG8="}, {**entry, "jpeg": '"><script>'}, entry, 3]
    (written.parent / "disagreements").mkdir()
    (written.parent / "disagreements" / f"{written.name}.json").write_text(json.dumps(entries))

    (found,) = runs.read(written)

    assert [one["jpeg"] for one in found.disagreements] == ["aGVsbG8="]


def search(folder, **told):
    (folder / "outcome.json").write_text(json.dumps({"pick": None, "reason": "no point satisfies the budget", **told}))


def test_bundles_that_the_last_search_did_not_write_are_left_out_and_named(written):
    shutil.copytree(written, written.parent / "tiny-r4-int8")
    search(written.parent, bundles=[written.name])

    assert [one.folder for one in runs.read(written.parent)] == [written.name]
    assert runs.outcome(written.parent).others == ("tiny-r4-int8",)


def test_a_search_without_a_bundle_says_why(written):
    search(written.parent, bundles=[])

    with pytest.raises(ConfigError, match="the search that was here wrote no bundle: no point satisfies the budget"):
        runs.read(written.parent)


def test_bundles_of_two_models_are_not_compared(written):
    other = written.parent / "other-r6-int8"
    shutil.copytree(written, other)
    content = json.loads((other / "manifest.json").read_text())
    content["model"].update(name="other", sha256="12" * 32)
    (other / "manifest.json").write_text(json.dumps(content))
    bundle.seal(other)

    with pytest.raises(
        ConfigError, match=r"bundles of 2 models \(other 12121212, tiny abababab\).*a folder of its own"
    ):
        runs.read(written.parent)
    assert len(runs.read(other)) == 1


def test_the_outcome_of_a_search_is_read_and_may_be_missing(tmp_path):
    assert runs.outcome(tmp_path) is None

    content = {"pick": "r168-int8@openvino", "reason": "lowest latency", "front": ["r168-int8@openvino"]}
    (tmp_path / "outcome.json").write_text(json.dumps(content))

    assert runs.outcome(tmp_path) == Outcome(**{**content, "front": ("r168-int8@openvino",)})


def test_what_a_search_wrote_of_points_and_candidates_is_read_back(tmp_path):
    one = evidence(160, 2.0, 4.0, batch=8)
    search(tmp_path, measured=serde.to_json([one]), judged=serde.to_json([candidate(96, 5.0)]))

    found = runs.outcome(tmp_path)

    (measured,), (judged,) = found.measured, found.judged
    assert (measured.variant, measured.way, measured.drop, measured.latency_ms) == (
        one.variant,
        "openvino-batch8",
        2.0,
        4.0,
    )
    assert (judged.variant.id, judged.drop, judged.images, judged.latency_ms) == ("r96-fp32", 5.0, 64, None)


def test_a_damaged_outcome_is_read_as_far_as_it_can_be(written):
    search(written.parent, pick="r6-int8@openvino", front=3, bundles="all", measured=[{"point": {}}], judged={})

    assert runs.outcome(written.parent) == Outcome(pick="r6-int8@openvino", reason="no point satisfies the budget")


def test_that_a_search_picked_nothing_is_not_that_there_was_none(tmp_path):
    (tmp_path / "outcome.json").write_text(json.dumps({"pick": None, "reason": "no point satisfies the budget"}))

    assert runs.outcome(tmp_path) == Outcome(pick=None, reason="no point satisfies the budget")
