"""FP16, INT8 with an FP16 rest, and mixed precision through the real command line, on the trained digits network."""

import json

import pytest

from rdeploy.backends import tensorrt_rtx

from .conftest import BUILD

RTX = """\
description: RTX 40, the engines are built and not run
backends: [tensorrt_rtx]
compute_capabilities: [sm_89]
precisions: [fp32, fp16, int8]
"""
needs_rtx = pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))


@pytest.fixture(scope="module")
def rtx(workplace):
    (workplace.folder / "rtx.yaml").write_text(RTX)
    words = [word if word != "quick.yaml" else "rtx.yaml" for word in BUILD]
    return workplace, workplace.run(*words, "--fp16")


def manifest_of(workplace, name):
    return json.loads((workplace.folder / "out" / name / "manifest.json").read_text())


@needs_rtx
def test_fp16_is_a_bundle_of_its_own_with_its_fp32_layers_named(rtx):
    jsonschema = pytest.importorskip("jsonschema", reason="only tests validate with jsonschema")
    workplace, done = rtx
    assert done.returncode == 0, done.stderr
    manifest = manifest_of(workplace, "digits-r24-fp16")
    (engine,) = manifest["engines"]

    jsonschema.Draft202012Validator(json.loads(workplace.run("schema", "manifest").stdout)).validate(manifest)
    assert [kept["reason"] for kept in manifest["variant"]["fp16"]["kept"]] == ["accumulates"]
    assert manifest["variant"]["fp16"]["samples"] == 64
    assert manifest["cost"]["weight_bytes"] < 0.55 * manifest["baseline"]["cost"]["weight_bytes"]
    assert engine["executed_precision"]["fp16"] >= 3
    assert engine["verification"]["executed_by"].endswith("(the same graph)")
    assert engine["verification"]["parity"]["sqnr_db"] > 40
    assert engine["measurement"] is None


@needs_rtx
def test_the_float_rest_of_an_int8_graph_is_fp16_there(rtx):
    workplace, _ = rtx
    manifest = manifest_of(workplace, "digits-r24-int8")
    (engine,) = manifest["engines"]

    assert engine["executed_precision"]["int8"] >= 3
    assert "fp32" not in engine["executed_precision"]
    assert manifest["variant"]["fp16"]["kept"]
    assert engine["verification"]["parity"]["sqnr_db"] > 15


@pytest.fixture(scope="module")
def controlled(workplace):
    """One image of the 400 may be lost; with the 7-bit weights of a CPU without VNNI that takes layers in float."""
    done = workplace.run(*BUILD, "--max-drop", "0.3", "--backend", "onnxruntime", "--out", "mixed")
    assert done.returncode == 0, done.stderr
    (folder,) = (workplace.folder / "mixed").glob("digits-r24-*")
    return workplace, done, folder


def test_the_layers_that_hurt_stay_in_float_until_the_budget_holds(controlled):
    jsonschema = pytest.importorskip("jsonschema", reason="only tests validate with jsonschema")
    workplace, _, folder = controlled
    manifest = json.loads((folder / "manifest.json").read_text())
    quantization = manifest["variant"]["quantization"]
    found = quantization["fallbacks"]

    jsonschema.Draft202012Validator(json.loads(workplace.run("schema", "manifest").stdout)).validate(manifest)
    drops = {point["layers"]: point["drop"] for point in found["curve"]}
    assert manifest["variant"]["precision"] == ("mixed" if drops[0] > 0.3 else "int8")
    assert bool(found["layers"]) == (drops[0] > 0.3)
    assert drops[len(found["layers"])] <= 0.3
    assert {one["layer"] for one in found["layers"]} <= {one["layer"] for one in quantization["skipped"]}
    assert (found["samples"], found["labelled"]) == (400, True)
    assert all(point["latency_ms"] is not None for point in found["curve"])
    assert manifest["engines"][0]["verification"]["accuracy"]["value"] > 0.85


def test_what_to_deploy_is_said_with_the_numbers(controlled):
    _, done, folder = controlled
    found = json.loads((folder / "manifest.json").read_text())["recommendation"]

    assert found["place"] == "r24"
    assert found["precision"] in ("int8", "mixed", "fp32")
    assert found["against"] == "fp32"
    assert found["speedup"] > 0
    assert f"r24: {found['precision'].upper()}; {found['reason']}" in done.stderr
    assert "points lost" in (folder / "report.md").read_text()


def test_what_can_be_expected_is_said_before_the_work_begins(controlled):
    _, done, _ = controlled
    lines = done.stderr.splitlines()

    assert lines[0].startswith("expected: this CPU has ")
    assert lines.count(lines[0]) == 1
