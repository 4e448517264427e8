"""The verbs that use what was built: run, profile, evaluate."""

import json

import numpy as np
import pytest
from PIL import Image

import rdeploy
from rdeploy import bundle, cli
from rdeploy.errors import ConfigError

QUICK = """backends: [onnxruntime]
timing: {min_samples: 20, max_samples: 40, min_time_s: 0.01, max_time_s: 0.5, max_warmup_s: 0.05}
"""


@pytest.fixture
def quick(tmp_path):
    """A target that measures for a moment only."""
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Two images of each colour in class folders, named as the model's labels are."""
    for index, name in enumerate(("red", "green ish", "blue")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for brightness in (200, 255):
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[..., index] = brightness
            Image.fromarray(pixels).save(folder / f"{brightness}.png")
    return tmp_path / "photos"


def test_run_prints_the_best_classes_of_each_image(tiny_bundle, photos, capsys):
    images = [str(photos / "blue" / "255.png"), str(photos / "red" / "255.png")]

    assert cli.execute(["run", str(tiny_bundle), *images, "--top", "1"]) == 0

    out, err = capsys.readouterr()
    # Logits of pure blue are (-1, -2, 3), of pure red (1, -2, -3).
    assert out == f"{images[0]}\n   97.6 %  blue\n{images[1]}\n   93.6 %  red\n"
    assert err == ""


def test_run_names_a_corrupt_image_in_one_line_and_goes_on(tiny_bundle, photos, capsys, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a photo")
    words = ["run", str(tiny_bundle), str(tmp_path / "torn.jpg"), str(photos / "red" / "255.png"), "--json"]

    assert cli.execute(words) == 2

    out, err = capsys.readouterr()
    torn, red = json.loads(out)["images"]
    assert torn["predictions"] == []
    assert red["predictions"][0]["label"] == "red"
    assert err.startswith("rdeploy run: ")
    assert "torn.jpg could not be read" in err
    assert err.count("\n") == 1


def test_run_tells_which_engine_was_passed_over(written, photos, capsys, monkeypatch, tiny_bundle):
    content = json.loads((tiny_bundle / "manifest.json").read_text())
    other = dict(content["engines"][0], backend="tensorrt", built_for=["sm_89"])
    content["engines"].insert(0, other)
    (tiny_bundle / "manifest.json").write_text(json.dumps(content))
    bundle.seal(tiny_bundle)

    assert cli.execute(["run", str(tiny_bundle), str(photos / "red" / "255.png")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("rdeploy run: ")
    assert "using onnxruntime; passed over tensorrt: " in err
    assert err.count("\n") == 1


def test_run_refuses_what_is_no_bundle(tmp_path, capsys):
    assert cli.execute(["run", str(tmp_path), "x.jpg"]) == 2
    assert "not a bundle, there is no manifest.json in it" in capsys.readouterr().err


def test_evaluate_scores_labelled_images_with_an_interval(tiny_bundle, photos, capsys):
    assert cli.execute(["evaluate", str(tiny_bundle), "--data", str(photos), "--json"]) == 0

    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert (accuracy["value"], accuracy["samples"], accuracy["labelled"]) == (1.0, 6, True)
    assert accuracy["ci95"][0] == pytest.approx(6 / (6 + 1.959964**2))


def test_evaluate_says_how_often_two_bundles_decide_alike(tiny_bundle, photos, capsys):
    assert cli.execute(["evaluate", str(tiny_bundle), "--data", str(photos), "--against", str(tiny_bundle)]) == 0

    shown = capsys.readouterr().out
    assert "agreement  100.0 %" in shown
    assert "reference  100.0 %  (drop +0.0 points)" in shown


def test_evaluate_without_labels_says_what_is_missing(tiny_bundle, photos, capsys):
    assert cli.execute(["evaluate", str(tiny_bundle), "--data", str(photos / "red")]) == 2
    assert "has no labels" in capsys.readouterr().err


def test_evaluate_needs_no_labels_for_agreement(tiny_bundle, photos):
    found = rdeploy.evaluate(tiny_bundle, photos / "red", against=tiny_bundle)

    assert found.accuracy is None
    assert found.agreement.value == 1.0


def test_profile_measures_the_engines_of_a_bundle(tiny_bundle, quick, capsys):
    assert cli.execute(["profile", str(tiny_bundle), "--target", quick, "--json"]) == 0

    (found,) = json.loads(capsys.readouterr().out)
    assert found["backend"] == "onnxruntime"
    assert found["measurement"]["samples"] >= 20
    assert found["measurement"]["p50_ms"] > 0
    assert found["measurement"]["p99_ms"] is None


def test_profile_builds_an_onnx_file_first_and_prints_a_table(tiny_onnx, quick, capsys):
    assert cli.execute(["profile", str(tiny_onnx), "--target", quick, "--batch", "2"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_profile_sweeps_batches_and_keeps_all_samples(tiny_onnx, quick, capsys, tmp_path):
    out = tmp_path / "kept"
    words = ["profile", str(tiny_onnx), "--target", quick, "--batch", "1", "--batch", "2", "--out", str(out), "--json"]

    assert cli.execute([*words, "--streams", "2", "--fps", "200", "--layers"]) == 0

    one, two = json.loads(capsys.readouterr().out)
    assert [entry["measurement"]["batch"] for entry in (one, two)] == [1, 2]
    assert len(one["raw"]["latencies_ms"]) == one["measurement"]["samples"]
    assert one["measurement"]["memory"]["build_peak"] > 0
    assert one["measurement"]["machine"]["cpu"]
    assert one["measurement"]["throughput"][0]["streams"] == 2
    assert one["measurement"]["paced"]["fps"] == 200.0
    layers = one["measurement"]["layers"]
    total = sum(kernel["mean_ms"] for kernel in layers["kernels"]) + layers["remainder_ms"]
    assert total == pytest.approx(layers["whole_ms"])
    kept = json.loads((out / "profile.json").read_text())
    assert kept["engines"][1]["measurement"] == two["raw"]
    assert kept["environment"]["cpu"]


def test_profile_from_the_image_file_to_the_answer(tiny_bundle, photos, quick, capsys):
    words = ["profile", str(tiny_bundle), "--target", quick, "--end-to-end", str(photos)]

    assert cli.execute(words) == 0

    shown = capsys.readouterr().out
    assert "From the image file to the answer, median ms" in shown
    assert "decode preprocess inference" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mlperf", "Offline"], "MLPerf's load generator writes logs of its own: say where with --out DIR"),
        (["--fps", "0"], "a camera takes more than 0 and at most 1000 frames a second, not 0"),
        (["--end-to-end", "absent"], "absent does not exist"),
    ],
)
def test_profile_refuses_what_cannot_be_measured(tiny_bundle, quick, capsys, words, message):
    assert cli.execute(["profile", str(tiny_bundle), "--target", quick, *words]) == 2
    assert message in capsys.readouterr().err


def test_end_to_end_begins_at_files(tiny_bundle, tmp_path, quick):
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))

    with pytest.raises(ConfigError, match="a.npy holds arrays, and end to end begins at image files"):
        rdeploy.profile(tiny_bundle, target=quick, end_to_end=tmp_path / "a.npy")
    with pytest.raises(ConfigError, match="unknown MLPerf scenario 'Server'"):
        rdeploy.profile(tiny_bundle, target=quick, mlperf="Server", out=tmp_path)


def test_profile_of_engines_that_cannot_run_here_is_exit_code_3(tiny_bundle, quick, capsys):
    content = json.loads((tiny_bundle / "manifest.json").read_text())
    content["engines"][0].update(backend="tensorrt", built_for=["sm_89"])
    (tiny_bundle / "manifest.json").write_text(json.dumps(content))
    bundle.seal(tiny_bundle)

    assert cli.execute(["profile", str(tiny_bundle), "--target", quick]) == 3
    assert capsys.readouterr().err.startswith("rdeploy profile: tensorrt: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "absent"}, "absent: neither a bundle nor an ONNX file"),
        ({"backend": ("openvino",)}, "this bundle has no openvino; its engines: onnxruntime"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
    ],
)
def test_profile_refuses_a_wrong_request(tiny_bundle, change, message):
    with pytest.raises(ConfigError, match=message):
        rdeploy.profile(**{"path": tiny_bundle, **change})


def test_a_broken_onnx_file_is_the_failure_of_each_backend(tmp_path, quick, capsys):
    (tmp_path / "broken.onnx").write_bytes(b"no model")

    assert cli.execute(["profile", str(tmp_path / "broken.onnx"), "--target", quick]) == 1
    assert "ONNX Runtime cannot load" in capsys.readouterr().err
