"""A bundle, a manifest and a baseline file give snapshots that compare; anything else is refused in one sentence."""

import importlib.util
import json
from pathlib import Path

import pytest

import rdeploy
from rdeploy import baseline
from rdeploy.errors import ConfigError
from rdeploy.snapshot import EngineFacts, Launch, Share, Snapshot, Speedup

SCHEMA = Path(rdeploy.__file__).parent / "schemas" / "baseline.schema.json"
FULL = Snapshot(
    name="net r6-int8",
    created="2026-01-01T00:00:00+00:00",
    machine={"cpu": "a CPU", "runtimes": {"onnxruntime": "1.30"}},
    counts={"macs": 100, "qdq_coverage": 0.97},
    engines=(
        EngineFacts(
            backend="onnxruntime",
            size_bytes=10,
            launches=(Launch(blocks_ms=((1.0, 2.0), (3.0,)), process_peak_bytes=7, build_s=0.5),),
            native=(Launch(blocks_ms=((2.0,),)),),
            speedup=Speedup(value=2.0, ci95=(1.9, 2.1), memory_ratio=None),
            accuracy=Share(right=1, samples=2, per_image="10", images="ab"),
        ),
    ),
)


def test_a_baseline_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "baseline.json"

    baseline.write(path, FULL)

    assert baseline.read(path) == FULL
    assert [file.name for file in path.parent.iterdir()] == ["baseline.json"]


def test_a_baseline_file_fits_its_schema(tmp_path, written, monkeypatch):
    monkeypatch.setattr(baseline, "_counted", lambda onnx: {})  # the graph of this bundle is no real one
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    for index, snapshot in enumerate((FULL, baseline.read(written))):
        path = tmp_path / f"{index}.json"
        baseline.write(path, snapshot)
        jsonschema.validate(json.loads(path.read_text()), schema)


def test_a_bundle_and_its_manifest_tell_the_same(tmp_path, written, monkeypatch):
    monkeypatch.setattr(baseline, "_counted", lambda onnx: {})  # the graph of this bundle is no real one
    copy = tmp_path / "elsewhere.json"
    copy.write_text((written / "manifest.json").read_text())

    bundle, manifest = baseline.read(written), baseline.read(copy)

    assert bundle.counts == manifest.counts
    assert bundle.counts["qdq_coverage"] == 0.97
    assert [one.backend for one in bundle.engines] == [one.backend for one in manifest.engines]
    first, same = bundle.engine("onnxruntime"), manifest.engine("onnxruntime")
    assert len(first.launches[0].blocks_ms[0]) == 200
    assert len(same.launches[0].blocks_ms[0]) == 1
    assert first.speedup == same.speedup
    assert (first.accuracy.right, first.accuracy.samples) == (34, 40)


@pytest.mark.skipif(importlib.util.find_spec("onnx_ir") is None, reason="counting nodes reads the graph")
def test_the_nodes_of_a_bundles_graph_are_counted(tiny_bundle):
    assert baseline.read(tiny_bundle).counts["nodes"] == 3


def test_an_engine_that_was_refused_says_so(tmp_path, written):
    content = json.loads((written / "manifest.json").read_text())
    content["engines"][0]["verification"] = {"passed": False, "reasons": ["cosine 0.1"]}
    (tmp_path / "m.json").write_text(json.dumps(content))

    assert baseline.read(tmp_path / "m.json").engines[0].failure == "verification refused it: cosine 0.1"


def test_the_10th_percentile_and_the_mean_of_a_launch():
    launch = Launch(blocks_ms=(tuple(range(20, 0, -1)), ()))

    assert launch.latency_ms == 2
    assert launch.mean_ms == 10.5


def test_this_machine_is_named_by_a_hash_only():
    facts = baseline.here()

    assert len(facts["host"]) == 12
    assert {"cpu", "cpu_flags", "threads"} <= set(facts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "neither a manifest nor a baseline, but a JSON list"),
        ('{"a": 1}', "neither a manifest nor a baseline; `rdeploy check BUNDLE --write-baseline` writes one"),
        ('{"machine": {}, "counts": {}, "schema_version": 2}', "schema_version 2, this rdeploy reads 1; write it again"),
        ('{"machine": {}, "counts": {}, "schema_version": 1, "name": "n", "speed": 1}', "unknown key 'speed'"),
        ('{"machine": {}, "counts": {"macs": "x"}, "schema_version": 1, "name": "n"}', "'x' stands where a number of 0 "),
        ('{"machine": {}, "counts": [1], "schema_version": 1, "name": "n"}', "not a baseline file"),
        ('{"machine": {}, "counts": {}, "schema_version": 1, "name": "n", "engines": [{"backend": "a", "launches": '
         '[{"blocks_ms": [[-1.0]]}]}]}', "-1.0 stands where a number of 0 or more belongs"),
    ],
)  # fmt: skip
def test_what_is_no_baseline_is_refused(tmp_path, content, message):
    path = tmp_path / "b.json"
    path.write_text(content)

    with pytest.raises(ConfigError) as caught:
        baseline.read(path)

    assert message in str(caught.value)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.json: No such file"):
        baseline.read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="not a bundle, there is no manifest.json in it"):
        baseline.read(tmp_path)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"cannot write the baseline .*: "):
        baseline.write(tmp_path / "file" / "b.json", FULL)


@pytest.mark.skipif(importlib.util.find_spec("onnx_ir") is None, reason="counting nodes reads the graph")
def test_a_bundle_with_a_damaged_graph_is_refused(written):
    with pytest.raises(ConfigError, match=r"model.onnx: cannot be read as a graph"):
        baseline.read(written)
