import dataclasses

from rdeploy import manifest
from rdeploy.adapted import Adaptation, Rung, Usability
from rdeploy.report import ladder, markdown
from rdeploy.types import Variant

LADDER = Adaptation(
    metric="accuracy",
    images=300,
    chosen_on=128,
    native_accuracy=0.906,
    rungs=(
        Rung(step="plain", kept=True, agreement=0.85, accuracy=0.784, seconds=1.2),
        Rung(
            step="preprocessing",
            kept=True,
            agreement=0.87,
            accuracy=0.806,
            gain=2.2,
            gain_ci95=(0.4, 4.1),
            detail="crop 0.9 instead of 0.875",
            seconds=9.6,
        ),
        Rung(
            step="batchnorm",
            kept=False,
            agreement=0.8,
            accuracy=0.7,
            gain=-10.6,
            gain_ci95=(-15, -6),
            detail="0.1 of the statistics of 85 images",
        ),
    ),
    reason="distill: 60 images are left to train on",
)
VERDICT = Usability(verdict="needs fine-tuning", reason="loses 10.0 points", drop=10.0, ci95=(8.0, 12.0), labelled=True)


def told(result):
    row = dataclasses.replace(result.variants[0], adaptation=LADDER, usability=VERDICT)
    twin = dataclasses.replace(row, variant=Variant(resolution=(6, 6)))
    return dataclasses.replace(result, variants=(row, twin))


def test_the_report_shows_the_ladder_of_each_place_once(result):
    report = markdown.render(told(result))

    assert "| variant | step | agrees with native % | accuracy % | gain [95 %] |  | what | s |" in report
    assert report.count("| r6 | lower resolution alone | 85.0 | 78.4 |  |  |  | 1 |") == 1
    assert "| r6 | preprocessing | 87.0 | 80.6 | +2.2 [0.4, 4.1] | kept | crop 0.9 instead of 0.875 | 10 |" in report
    assert (
        "| r6 | BatchNorm statistics | 80.0 | 70.0 | -10.6 [-15.0, -6.0] | dropped | 0.1 of the statistics of 85 images |"
        in report
    )
    assert "- r6: chosen on 128 images, judged on 300 others; the native model has 90.6 % on these" in report
    assert "- r6: not tried, or nothing gained: distill: 60 images are left to train on" in report


def test_every_variant_has_its_verdict_in_report_and_table(result):
    found = told(result)

    assert ladder.verdicts(found)[0] == "r6-int8: needs fine-tuning: loses 10.0 points"
    assert "- r6-int8: needs fine-tuning: loses 10.0 points" in markdown.render(found)
    assert {row.verdict for row in markdown.table(found) if row.variant != "native"} == {"needs fine-tuning"}
    assert markdown.table(found)[0].verdict == ""


def test_the_command_line_tells_each_step_in_a_sentence(result):
    assert ladder.sentences(told(result)) == [
        "r6, preprocessing: 78.4 -> 80.6 % (+2.2 points [0.4, 4.1]), kept: crop 0.9 instead of 0.875",
        "r6, BatchNorm statistics: 80.6 -> 70.0 % (-10.6 points [-15.0, -6.0]), dropped: 0.1 of the statistics of 85 images",
    ]


def test_a_manifest_tells_the_same(result):
    found = told(result)

    lines = ladder.of_manifest(manifest.manifest(found, found.variants[0]))

    assert lines[0] == "r6-int8: needs fine-tuning: loses 10.0 points"
    assert lines[1].startswith("r6-int8, preprocessing: 78.4 -> 80.6 %")
    assert ladder.of_manifest(manifest.manifest(result, result.variants[0])) == []


def test_where_nothing_was_tried_only_the_reason_is_there(result):
    row = dataclasses.replace(result.variants[0], adaptation=Adaptation(reason="27 images, 128 are the fewest"))
    report = markdown.render(dataclasses.replace(result, variants=(row,)))

    assert "- r6: not tried, or nothing gained: 27 images, 128 are the fewest" in report
    assert "| step |" not in report
    assert ladder.table(result) == ""


def test_a_manifest_with_all_of_it_satisfies_the_schema(result):
    import json
    from importlib import resources

    import pytest

    jsonschema = pytest.importorskip("jsonschema", reason="only tests validate with jsonschema")
    schema = json.loads((resources.files("rdeploy") / "schemas" / "manifest.schema.json").read_text())
    found = told(result)
    variant = dataclasses.replace(found.variants[0].variant, embeds_preprocessing=True)
    row = dataclasses.replace(found.variants[0], variant=variant)
    content = manifest.manifest(found, row)

    jsonschema.Draft202012Validator(schema).validate(
        {**content, "onnx": {"path": "model.onnx", "sha256": "ab" * 32, "size_bytes": 1}}
    )

    assert content["model"]["preprocessing"]["inside"] == {"interpolation": "bilinear", "antialias": True}
    assert content["variant"]["adaptation"]["rungs"][1]["detail"] == "crop 0.9 instead of 0.875"


def test_a_variants_own_preprocessing_is_the_manifests(result):
    row = result.variants[0]
    own = dataclasses.replace(result.spec.preprocessing, crop_pct=0.9, antialias=False)
    row = dataclasses.replace(row, variant=dataclasses.replace(row.variant, preprocessing=own))

    found = manifest.manifest(result, row)["model"]["preprocessing"]

    assert (found["crop_pct"], found["antialias"], found["embedded"]) == (0.9, False, False)
    assert "inside" not in found
