"""Segmentation and embeddings through the command line, on a network that was trained for it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import Workplace

BUILD = (
    "build", "shapes.pt", "--arch", "shapes_model:shapes_net", "--scale", "0.75", "--int8", "--calib", "scenes",
    "--data", "scenes", "--void", "7", "--target", "quick.yaml", "--out", "out",
)  # fmt: skip
BUNDLE = "out/shapes-r36x48-int8"


@pytest.fixture(scope="module")
def built(scenes) -> Workplace:
    done = scenes.run(*BUILD)
    assert done.returncode == 0, done.stderr
    assert "mIoU %" in done.stdout
    return scenes


def manifest_of(workplace: Workplace, bundle: str = BUNDLE) -> dict:
    return json.loads((workplace.folder / bundle / "manifest.json").read_text())


def test_a_segmentation_is_scored_against_its_masks_and_the_native_model(built):
    manifest = manifest_of(built)
    onnx_outputs = {engine["backend"]: engine["verification"] for engine in manifest["engines"]}

    assert manifest["model"]["task"] == "segmentation"
    assert manifest["model"]["preprocessing"]["crop_mode"] == "squash"
    for verification in onnx_outputs.values():
        assert verification["passed"], verification["reasons"]
        accuracy, agreement = verification["accuracy"], verification["agreement"]
        assert (accuracy["metric"], accuracy["samples"], accuracy["labelled"]) == ("miou", 40, True)
        assert accuracy["reference"] > 0.8
        assert abs(accuracy["drop"]) < 0.1
        assert accuracy["ci95"][0] < accuracy["value"] < accuracy["ci95"][1]
        assert agreement["value"] > 0.9
        assert verification["parity"]["top1_agreement"] > 0.98


def test_layers_stay_in_float_until_the_loss_of_miou_holds(built):
    """Without masks it would be the share of pixels that are decided otherwise."""
    words = [word if word != "out" else "within" for word in BUILD]

    done = built.run(*words, "--max-drop", "0.05")

    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in (built.folder / "within").iterdir() if (path / "manifest.json").is_file())
    manifest = manifest_of(built, f"within/{folder.name}")
    fallbacks = manifest["variant"]["quantization"]["fallbacks"]
    assert (fallbacks["max_drop"], fallbacks["samples"], fallbacks["labelled"]) == (0.05, 40, True)
    assert min(point["drop"] for point in fallbacks["curve"]) <= 0.05


def test_the_scenes_of_which_the_most_pixels_differ_are_kept_for_the_report(built):
    first, *_ = json.loads((built.folder / "out" / "disagreements" / f"{Path(BUNDLE).name}.json").read_text())

    assert "% differ" in first["variant"]
    assert (built.folder / "scenes" / "images" / first["name"]).is_file()


def test_the_scores_come_back_at_the_native_size(built):
    import rdeploy

    with rdeploy.load(built.folder / BUNDLE) as model:
        scores = model(np.zeros((2, 48, 64, 3), np.uint8))
        classes = model.segment(built.folder / "scenes/images/000.png")

    assert model.resolution == (36, 48)
    assert scores.shape == (2, 3, 48, 64)
    assert classes.shape == (96, 128)


def test_evaluate_gives_the_same_score_and_needs_to_know_what_is_void(built):
    done = built.run("evaluate", BUNDLE, "--data", "scenes", "--void", "7", "--json")
    refused = built.run("evaluate", BUNDLE, "--data", "scenes")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    engine = manifest_of(built)["engines"][0]
    assert found["executed_by"].startswith(engine["backend"])
    assert found["accuracy"]["value"] == pytest.approx(engine["verification"]["accuracy"]["value"], abs=0.005)
    assert refused.returncode == 2
    assert "a mask holds class 7, but the model has 3 classes (0 to 2); if it means no class, say so with --void 7" in (
        refused.stderr
    )


def test_run_paints_the_classes_over_the_image(built):
    image = "scenes/images/001.png"
    done = built.run("run", BUNDLE, image, "--out", "overlays", "--json")

    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["images"]
    overlay = built.folder / answer["overlay"]
    assert overlay == built.folder / "overlays/001-overlay.png"
    assert {"background", "disc"} <= {one["label"] for one in answer["predictions"]} <= {"background", "square", "disc"}
    assert sum(one["share"] for one in answer["predictions"]) == pytest.approx(1.0)
    with Image.open(overlay) as painted, Image.open(built.folder / image) as given:
        assert painted.size == given.size
        assert not np.array_equal(np.asarray(painted), np.asarray(given))


def test_a_variant_with_its_preprocessing_inside_takes_the_native_models_pictures(built):
    import rdeploy

    done = built.run(
        *[{"out": "inside"}.get(word, word) for word in BUILD], "--embed-preprocess", "--backend", "onnxruntime"
    )

    assert done.returncode == 0, done.stderr
    manifest = manifest_of(built, "inside/shapes-r36x48-int8")
    told = manifest["model"]["preprocessing"]
    assert (told["layout"], told["dtype"], told["range"], told["input_size"]) == ("NHWC", "uint8", [0, 255], [48, 64])
    assert manifest["engines"][0]["verification"]["passed"]
    assert manifest["engines"][0]["executed_precision"]["int8"] > 0
    assert manifest["engines"][0]["measurement"]["p50_ms"] > 0
    picture = np.asarray(Image.open(built.folder / "scenes/images/002.png").resize((64, 48), Image.Resampling.BILINEAR))
    with (
        rdeploy.load(built.folder / "inside/shapes-r36x48-int8") as inside,
        rdeploy.load(built.folder / BUNDLE) as outside,
    ):
        (batch,) = inside.batches(picture)
        scores = inside.run(batch)["output"]
        assert (batch.dtype, batch.shape) == (np.uint8, (1, 48, 64, 3))
        assert np.array_equal(batch[0], picture)  # nothing is done to it outside
        assert scores.shape == (1, 3, 48, 64)
        assert np.mean(scores.argmax(1) == outside(picture).argmax(1)) > 0.97
    evaluated = built.run("evaluate", "inside/shapes-r36x48-int8", "--data", "scenes", "--void", "7", "--json")
    ran = built.run("run", "inside/shapes-r36x48-int8", "scenes/images/001.png", "--out", "overlays", "--json")
    assert json.loads(evaluated.stdout)["accuracy"]["value"] > 0.8
    assert ran.returncode == 0, ran.stderr


def test_an_embedding_is_judged_by_its_cosine(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "place")
    place = Workplace(tmp_path / "place")
    done = place.run(
        "build", "digits.pt", "--arch", "digits_model:digits_net", "--task", "embedding", "--scale", "0.75", "--int8",
        "--calib", "images", "--calib-samples", "40", "--backend", "onnxruntime", "--target", "quick.yaml", "--out", "out",
    )  # fmt: skip
    image = next((place.folder / "images").rglob("*.png"))
    ran = place.run("run", "out/digits-r24-int8", str(image), "--json")

    assert done.returncode == 0, done.stderr
    assert "cosine %" in done.stdout
    verification = manifest_of(place, "out/digits-r24-int8")["engines"][0]["verification"]
    assert (verification["agreement"]["metric"], verification["accuracy"]) == ("cosine", None)
    assert 0.8 < verification["agreement"]["value"] < 1.0
    assert verification["parity"]["top1_agreement"] is None
    assert "cosine with native %" in (place.folder / "out/digits-r24-int8/report.md").read_text()
    assert len(json.loads(ran.stdout)["images"][0]["embedding"]) == 10
    assert Path(place.folder).is_dir()


def test_a_detector_is_judged_by_its_boxes(tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (extra: coco)")
    from . import blobs
    from .conftest import TARGET

    blobs.write(tmp_path)
    (tmp_path / "quick.yaml").write_text(TARGET)
    place = Workplace(tmp_path)
    done = place.run(
        "build", "blobs_model:blobs", "--task", "detection", "--scale", "1", "--int8", "--calib", "streets", "--data",
        "streets", "--backend", "onnxruntime", "--target", "quick.yaml", "--out", "out",
    )  # fmt: skip
    evaluated = place.run("evaluate", "out/blobs-r64x96-int8", "--data", "streets", "--json")
    ran = place.run("run", "out/blobs-r64x96-int8", "streets/images/00.png", "--json")

    assert done.returncode == 0, done.stderr
    assert "mAP %" in done.stdout
    verification = manifest_of(place, "out/blobs-r64x96-int8")["engines"][0]["verification"]
    assert verification["passed"], verification["reasons"]
    assert (verification["accuracy"]["metric"], verification["accuracy"]["samples"]) == ("map", 12)
    assert verification["accuracy"]["value"] > 0.95
    assert verification["agreement"]["value"] > 0.95
    assert json.loads(evaluated.stdout)["accuracy"]["value"] > 0.95
    answer = json.loads(ran.stdout)["images"][0]
    assert sorted(one["label"] for one in answer["predictions"]) == ["green", "red"]
    for one in answer["predictions"]:  # in pixels of the image, which is twice as large as the network's input
        left, top, right, bottom = one["box"]
        assert (right - left, bottom - top) == (pytest.approx(32, abs=1), pytest.approx(32, abs=1))
    assert (place.folder / answer["overlay"]).is_file()
