import dataclasses
import json
import os
import subprocess
from importlib import resources

import pytest

from rdeploy import bundle, manifest, serde, store
from rdeploy.errors import ConfigError
from rdeploy.measured import EndToEnd, Energy, LayerTime, LayerTimes, Measurement, Paced, Scenario, Throughput
from rdeploy.results import Accuracy, Verification


def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="a test-only dependency: pip install 'rdeploy[test]'")
    schema = json.loads((resources.files("rdeploy") / "schemas" / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def change_manifest(folder, change):
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    bundle.seal(folder)


def test_a_written_bundle_holds_what_the_contract_names(written):
    pytest.importorskip(
        "vl_convert", reason="report.html is drawn with vl-convert-python: pip install 'rdeploy[report]'"
    )
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}

    assert names == {
        "SHA256SUMS",
        "manifest.json",
        "measurements.json",
        "model.onnx",
        "labels.txt",
        "report.md",
        "report.html",
        "reproduce.sh",
        "logs/worker.log",
        "engines/onnxruntime/onnxruntime.onnx",
        "engines/openvino/openvino.xml",
        "engines/openvino/openvino.bin",
        "engines/tensorrt_rtx/sm_89.engine",
    }


def test_the_manifest_satisfies_its_schema(written):
    validator().validate(json.loads((written / "manifest.json").read_text()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.pop("reproduce"),
        lambda m: m["model"]["preprocessing"].update(std=[0, 1, 1]),
        lambda m: m["engines"][0].update(path="/etc/passwd"),
        lambda m: m["engines"][0]["files"][0].update(path="engines/../../x"),
        lambda m: m["engines"][1]["measurement"].update(p99_ms=3.0),
        lambda m: m["engines"][0].update(not_run=None),
        lambda m: m["comparison"].update(verdict="better"),
        lambda m: m["variant"].update(quantization=None),
    ],
)
def test_the_schema_refuses_what_no_manifest_may_say(written, damage):
    content = json.loads((written / "manifest.json").read_text())
    damage(content)

    assert not validator().is_valid(content)


def test_engines_are_ordered_by_what_a_machine_should_try_first(result):
    content = manifest.manifest(result, result.variants[0])

    assert [engine["backend"] for engine in content["engines"]] == ["tensorrt_rtx", "openvino", "onnxruntime"]
    assert content["comparison"]["backend"] == "openvino"
    assert content["baseline"]["backend"] == "openvino"
    assert content["baseline"]["measurement"]["p50_ms"] == pytest.approx(2.5, abs=0.01)


def test_an_engine_that_failed_verification_is_last_and_never_the_one_compared(result):
    row = result.variants[0]
    refused = Verification(passed=False, reasons=("constant output",))
    engines = tuple(
        dataclasses.replace(one, verification=refused) if one.backend == "openvino" else one for one in row.engines
    )

    content = manifest.manifest(result, dataclasses.replace(row, engines=engines))

    assert [engine["backend"] for engine in content["engines"]] == ["tensorrt_rtx", "onnxruntime", "openvino"]
    assert content["comparison"]["backend"] == "onnxruntime"


def test_percentiles_without_support_are_null_with_a_reason(result):
    measured = manifest.manifest(result, result.variants[0])["engines"][1]["measurement"]

    assert measured["p90_ms"] is not None
    assert measured["p99_ms"] is None
    assert "662" in measured["percentile_notes"]["p99_ms"]


def everything(measurement):
    """The measurement with everything that may be asked for."""
    energy = Energy(
        joules_per_run=0.2, watts=10.0, idle_watts=4.0, domains=(("package-0", 0.2),), runs=9, method="RAPL"
    )
    kernel = LayerTime(name="conv", kind="Conv", mean_ms=0.75, layers=("conv", "relu"))
    return dataclasses.replace(
        measurement,
        device_latencies_ms=(1.0, 3.0),
        device_clock="CUDA events",
        unfit=("load 3.1 on 2 cores",),
        machine=(("governor", "performance"),),
        energy=energy,
        throughput=(Throughput(streams=2, threads=1, seconds=1.0, runs=10, images_per_s=10.0, p50_ms=2.0),),
        paced=Paced(
            fps=30.0,
            paced_ms=(4.0,),
            back_to_back_ms=(2.0,),
            idle_cost=2.0,
            idle_cost_ci95=(1.9, 2.1),
            verdict="slower",
        ),
        layers=LayerTimes(profiler="x", runs=1, whole_ms=1.0, remainder_ms=0.25, kernels=(kernel,)),
        end_to_end=EndToEnd(images=2, decode_ms=(1.0, 2.0), preprocess_ms=(3.0,), inference_ms=(4.0,)),
        scenarios=(Scenario(scenario="Offline", valid=True, metric="images/s", value=9.0, folder="x"),),
        notes=("no meter",),
    )


def test_all_that_can_be_measured_is_in_the_manifest_and_comes_back_from_the_raw_file(result):
    row = result.variants[0]
    full = tuple(
        dataclasses.replace(one, measurement=everything(one.measurement)) if one.measurement else one
        for one in row.engines
    )
    row = dataclasses.replace(row, engines=full)

    content = manifest.manifest(result, row, files={one.backend: [FILE] for one in full})
    measured = content["engines"][1]["measurement"]
    raw = manifest.samples(result, row)["engines"]["openvino"]

    assert (measured["fit"], measured["unfit"]) == (False, ["load 3.1 on 2 cores"])
    assert measured["device"] == {"p50_ms": 2.0, "samples": 2, "clock": "CUDA events"}
    assert measured["energy"]["domains"] == {"package-0": 0.2}
    assert measured["end_to_end"]["decode_ms"] == 1.5
    assert measured["paced"]["paced_ms"] == 4.0
    assert "layers" not in measured  # a hundred kernels an engine: they are in measurements.json
    assert raw["layers"]["kernels"][0]["layers"] == ["conv", "relu"]
    validator().evolve(schema=measurement_schema()).validate(measured)
    assert serde.from_json(Measurement, raw) == full[1].measurement


FILE = {"path": "x", "sha256": "0" * 64, "size_bytes": 1}
ADDED = ("drift", "modes", "warnings", "definition", "fit", "unfit", "machine", "device", "notes")


def measurement_schema():
    schema = validator().schema
    return {"$defs": schema["$defs"], "$ref": "#/$defs/measurement"}


def test_a_manifest_from_before_these_facts_is_still_valid_and_readable(written):
    def age(content):
        for entry in content["engines"]:
            for name in ADDED:
                (entry["measurement"] or {}).pop(name, None)

    change_manifest(written, age)

    validator().validate(json.loads((written / "manifest.json").read_text()))
    assert bundle.read(written)["engines"]


def test_raw_measurements_from_before_these_facts_are_read():
    old = {"batch": 1, "threads": 2, "latencies_ms": [1.0], "warmup": 3, "stable": True, "load": 0.5, "clock_mhz": None}
    memory = {"weights": 1, "activations": None, "workspace": None, "process_peak": 5, "method": [["weights", "file"]]}

    found = serde.from_json(Measurement, {**old, "definition": "wall clock", "memory": memory})

    assert found.unfit == ()
    assert found.memory.build_peak is None


def test_an_engine_for_other_hardware_has_no_measurement_but_says_for_what(result):
    ahead = manifest.manifest(result, result.variants[0])["engines"][0]

    assert (ahead["measurement"], ahead["built_for"]) == (None, ["sm_89"])
    assert ahead["not_run"] == "built for sm_89, which is not here"


def test_a_failure_is_in_the_manifest_with_its_stage_and_how_to_see_it_again(result):
    assert manifest.manifest(result, result.variants[0])["failures"] == [
        {
            "backend": "reference",
            "stage": "build",
            "error": "StageError",
            "message": "no such op",
            "reproduce": "rdeploy worker j",
        }
    ]


def test_values_that_json_has_no_number_for_become_null(result):
    endless = Accuracy(
        metric="top1", value=0.5, reference=0.5, drop=0.0, ci95=(float("nan"), 1.0), samples=1, labelled=True
    )
    row = result.variants[0]
    engine = dataclasses.replace(row.engines[0], verification=Verification(passed=True, accuracy=endless))

    content = manifest.manifest(result, dataclasses.replace(row, engines=(engine,)))

    assert content["engines"][0]["verification"]["accuracy"]["ci95"] == [None, 1.0]
    json.dumps(content, allow_nan=False)


def test_raw_samples_lie_beside_the_manifest(written):
    raw = json.loads((written / "measurements.json").read_text())

    assert len(raw["engines"]["openvino"]["latencies_ms"]) == 200
    assert set(raw["baseline"]) == {"onnxruntime", "openvino"}


def test_reading_gives_back_the_manifest_from_the_folder_or_the_file(written):
    assert bundle.read(written) == bundle.read(written / "manifest.json")
    assert bundle.read(written)["variant"]["id"] == "r6-int8"


def test_labels_come_back_one_per_line(written):
    assert bundle.labels(written) == ("red", "green ish", "blue")


def test_every_engine_is_what_was_built(written):
    for entry in bundle.read(written)["engines"]:
        assert bundle.verified_engine(written, entry).is_file()


@pytest.mark.parametrize("name", ["openvino.xml", "openvino.bin"])
@pytest.mark.parametrize("content", [b"", b"<XML/>", b"weightz"])
def test_a_truncated_or_changed_engine_file_is_refused(written, name, content):
    (written / "engines" / "openvino" / name).write_bytes(content)
    entry = next(e for e in bundle.read(written)["engines"] if e["backend"] == "openvino")

    with pytest.raises(ConfigError, match=rf"engines/openvino/{name} was truncated or changed, .*rebuild it"):
        bundle.verified_engine(written, entry)


def test_a_missing_engine_file_is_named(written):
    (written / "engines" / "openvino" / "openvino.bin").unlink()
    entry = next(e for e in bundle.read(written)["engines"] if e["backend"] == "openvino")

    with pytest.raises(ConfigError, match=r"engines/openvino/openvino\.bin is missing"):
        bundle.verified_engine(written, entry)


def set_engine(**values):
    return lambda m: m["engines"][0].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema_version 99, this rdeploy reads 1; upgrade rdeploy"),
        (lambda m: m.pop("schema_version"), "schema_version is missing or not of type int"),
        (lambda m: m.pop("engines"), "engines is missing or not of type list"),
        (lambda m: m["model"]["preprocessing"].update(mean=["a"]), "mean must be numbers"),
        (lambda m: m["variant"].update(resolution=[0, 6]), "resolution must be two sides of 1 to 16384 pixels"),
        (lambda m: m["variant"].update(resolution=[6]), "resolution must be two sides of"),
        (
            lambda m: m["model"]["preprocessing"].update(embedded=True, input_size=[99999, 6]),
            "input_size must be two sides of 1 to 16384 pixels",
        ),
        (lambda m: m["variant"].update(resolution=[True, 6]), "resolution must be two sides of"),
        (lambda m: m["model"]["preprocessing"].update(std=[0, 1, 1]), "std must be numbers of at least 1e-06"),
        (lambda m: m["model"]["preprocessing"].update(crop_pct=1e-9), "crop_pct must be numbers of at least 0.1"),
        (lambda m: m["model"]["preprocessing"].update(mean=[float("nan")]), "mean must be numbers"),
        (set_engine(files=[]), "is not among its files"),
        (set_engine(files=[{"path": "../x", "sha256": "", "size_bytes": 0}]), "points outside the bundle"),
        (set_engine(path="/etc/passwd"), "is not among its files"),
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused_in_one_sentence(written, damage, message):
    change_manifest(written, damage)

    with pytest.raises(ConfigError, match=message) as caught:
        bundle.read(written)
    assert "\n" not in str(caught.value)


def test_an_engine_behind_a_link_out_of_the_bundle_is_refused(written, tmp_path):
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"weights")
    inside = written / "engines" / "openvino" / "openvino.bin"
    inside.unlink()
    inside.symlink_to(outside)

    with pytest.raises(ConfigError, match="points outside the bundle"):
        bundle.read(written)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"3"])
def test_a_manifest_that_is_no_json_object_is_refused(written, content):
    (written / "manifest.json").write_bytes(content)

    with pytest.raises(ConfigError, match=r"not valid JSON|missing or not of type"):
        bundle.read(written)


def test_a_manifest_of_absurd_size_is_not_read(written):
    with (written / "manifest.json").open("r+b") as file:
        file.truncate(17 << 20)

    with pytest.raises(ConfigError, match="too large for a manifest"):
        bundle.read(written)


def test_reading_what_is_no_bundle_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no such bundle"):
        bundle.read(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"not a bundle, there is no manifest\.json in it"):
        bundle.read(tmp_path)


def write_again(written, result, onnx):
    source = onnx.parent
    names = ("onnxruntime.onnx", "openvino.xml", "sm_89.engine")
    return bundle.write(written, result=result, row=result.variants[0], onnx=onnx, engines=dict.fromkeys(names, source))


def test_an_older_bundle_is_replaced(written, result, tmp_path):
    (written / "engines" / "old.engine").write_bytes(b"old")
    (tmp_path / "built" / "model.onnx").write_bytes(b"new graph")

    write_again(written, result, tmp_path / "built" / "model.onnx")

    assert (written / "model.onnx").read_bytes() == b"new graph"
    assert not (written / "engines" / "old.engine").exists()


def test_a_write_that_fails_leaves_the_older_bundle_whole_and_nothing_else(written, result, tmp_path):
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}

    with pytest.raises(FileNotFoundError):
        write_again(written, result, tmp_path / "built" / "absent.onnx")

    assert {path: path.read_bytes() for path in written.rglob("*") if path.is_file()} == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_folder_that_is_no_bundle_is_left_alone(result, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")

    with pytest.raises(ConfigError, match="exists and is not a bundle, it is left alone; choose another --out"):
        write_again(mine, result, tmp_path / "model.onnx")
    assert (mine / "chapter.txt").read_text() == "years of work"


def test_a_bundle_is_a_copy_so_that_changing_it_does_not_change_the_cache(written, tmp_path):
    with (written / "model.onnx").open("ab") as file:
        file.write(b"changed")

    assert (tmp_path / "built" / "model.onnx").read_bytes() == b"graph"


def test_a_bundle_that_cannot_be_written_is_one_sentence(result, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store.tempfile, "mkdtemp", full)

    with pytest.raises(ConfigError, match="No space left on device; free some space or choose another folder"):
        write_again(tmp_path / "out", result, tmp_path / "model.onnx")


@pytest.fixture
def shell(tmp_path):
    """Run a script with a `rdeploy` in front of the real one that prints each argument in angle brackets."""
    program = tmp_path / "bin" / "rdeploy"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def run(script):
        return subprocess.run([script], capture_output=True, text=True, env=environment, check=True).stdout

    return run


def test_reproduce_sh_is_executable_and_quotes_its_arguments(written, shell):
    assert shell(written / "reproduce.sh") == "<build><my model><--scale><0.75>"


def test_reproduce_sh_runs_nothing_that_hides_in_the_command(result, written, tmp_path, shell):
    hidden = f"rdeploy build x\ntouch {tmp_path}/owned; $(touch {tmp_path}/too)"
    row = dataclasses.replace(result.variants[0], reproduce=hidden)
    write_again(written, dataclasses.replace(result, variants=(row,)), tmp_path / "built" / "model.onnx")

    shown = shell(written / "reproduce.sh")

    assert shown == f"<build><x><touch><{tmp_path}/owned;><$(touch><{tmp_path}/too)>"
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "too").exists()


def test_an_engine_survives_the_way_through_the_manifest(result, written):
    entry = next(e for e in bundle.read(written)["engines"] if e["backend"] == "openvino")
    original = result.variants[0].engines[1].engine

    assert bundle.engine(entry) == dataclasses.replace(original, path="engines/openvino/openvino.xml")
