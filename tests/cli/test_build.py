import dataclasses
import errno
import json
import re
import sys
import types

import pytest

import rdeploy
from rdeploy import backends, cli
from rdeploy.cli import build as build_verb
from rdeploy.results import Failure, Result
from rdeploy.types import Variant


@pytest.fixture
def pipeline(monkeypatch, result):
    """Stand in for the pipeline: keeps the requests, returns `answer`, in which every engine was built."""
    fake = types.ModuleType("rdeploy.pipeline")
    fake.requests = []
    (row,) = result.variants
    built = tuple(one for one in row.engines if one.failure is None)
    fake.answer = dataclasses.replace(result, variants=(dataclasses.replace(row, engines=built),))

    def build(request, *, progress=None):
        fake.requests.append(request)
        progress("exporting") if progress else None
        return fake.answer

    fake.build = build
    monkeypatch.setitem(sys.modules, "rdeploy.pipeline", fake)
    monkeypatch.setattr(rdeploy, "pipeline", fake, raising=False)
    return fake


def only_request(pipeline):
    (request,) = pipeline.requests
    return request


def test_without_options_it_is_the_native_resolution_in_fp32(pipeline, capsys):
    assert cli.execute(["build", "timm:resnet18"]) == 0

    request = only_request(pipeline)
    assert (request.scales, request.resolutions, request.precisions) == ((1.0,), (), ("fp32",))
    assert (request.at, request.target, request.calib, request.batch_sizes) == (("input",), "cpu", None, ())


def test_every_option_arrives(pipeline, capsys, tmp_path):
    words = f"""build timm:x --scale 0.75 --scale 0.5 --resolution 168x224 --int8 --fp32 --calib {tmp_path}
        --calib-samples 64 --calibrator percentile --max-drop 0.5 --data {tmp_path} --arch timm:y --arch-kwargs num_classes=10
        --arch-kwargs act=relu --random-init --trust-pickle --offline --task classification --native-resolution 224
        --mean 0.5,0.4,0.3 --std 0.2,0.2,0.2 --interpolation bilinear --crop-pct 0.9 --target cpu --backend reference
        --batch 1 --batch 8 --out {tmp_path}/new --seed 7""".split()

    assert cli.execute(words) == 0

    request = only_request(pipeline)
    load = request.load
    assert request.scales == (0.75, 0.5)
    assert request.resolutions == ((168, 224),)
    assert request.precisions == ("fp32", "int8")
    assert (request.calib, request.calib_samples, request.calibrator) == (str(tmp_path), 64, "percentile")
    assert request.max_drop == 0.5
    assert (request.backends, request.batch_sizes, request.seed) == (("reference",), (1, 8), 7)
    assert (request.data, request.out) == (str(tmp_path), f"{tmp_path}/new")
    assert load.arch_kwargs == (("num_classes", 10), ("act", "relu"))
    assert (load.arch, load.random_init, load.trust_pickle, load.offline, load.seed) == ("timm:y", True, True, True, 7)
    assert (load.native_resolution, load.mean, load.std) == ((224, 224), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert (load.interpolation, load.crop_pct, load.task) == ("bilinear", 0.9, "classification")
    assert request.command == "rdeploy " + " ".join(words)


def test_places_are_compared_by_repeating_and_used_together_by_joining(pipeline, capsys):
    assert cli.execute(["build", "timm:x", "--scale", "0.75", "--at", "stem", "--at", "input@0.5+after:layer1"]) == 0

    assert only_request(pipeline).at == ("stem", "input@0.5+after:layer1")


def test_the_command_is_kept_such_that_a_shell_reads_it_back(pipeline, capsys):
    cli.execute(["build", "my model.onnx", "--scale", "0.5"])

    assert only_request(pipeline).command == "rdeploy build 'my model.onnx' --scale 0.5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scale 0", "scale 0 is out of range: it must be > 0 and <= 1 (0.75 turns 224 into 168)"),
        ("--scale -0.5", "scale -0.5 is out of range"),
        ("--scale 1000", "scale 1000 is out of range"),
        ("--scale 1.01", "scale 1.01 is out of range"),
        ("--scale nan", "scale nan is out of range"),
        ("--scale much", "Invalid value for '--scale': 'much' is not a valid float."),
        ("--resolution 0", "resolution 0 is out of range: each side must be within 1 to 8192 pixels"),
        ("--resolution 168x", "resolution '168x' is not a size; write N or HxW, such as 168 or 168x224"),
        ("--resolution 1x2x3", "resolution '1x2x3' is not a size"),
        ("--int8", "int8 needs images to find its ranges: give some of your own with --calib FOLDER"),
        ("--int8 --calib absent", "calib absent: no such file or folder"),
        ("--data absent", "data absent: no such file or folder"),
        ("--max-drop 1", "max-drop limits what INT8 may cost: give it together with --int8"),
        (
            "--int8 --calib random --max-drop -1",
            "max-drop -1 is out of range: it is in points of accuracy, from 0 to under",
        ),
        ("--calib-samples 0", "calib-samples 0 is out of range: it must be a whole number from 1"),
        ("--calibrator percentil", "unknown calibrator 'percentil', did you mean 'percentile'?"),
        ("--batch 0", "batch 0 is out of range"),
        ("--seed -1", "seed -1 is out of range"),
        ("--target gpu", "unknown target 'gpu'"),
        ("--backend openvin", "unknown backend 'openvin', did you mean 'openvino'?"),
        ("--task colouring", "unknown task 'colouring'"),
        ("--mean 127,127,127", "mean 127 is out of range: pixels are scaled to 0..1 first, divide it by 255"),
        ("--mean a,b,c", "Invalid value for '--mean': 'a,b,c' is no list of numbers"),
        ("--mean 0.5,0.5 --std 0.5,0.5,0.5", "mean has 2 values and std has 3"),
        ("--std 0,0.5,0.5", "std 0 is out of range: it divides, so it must be > 0"),
        ("--crop-pct 2", "crop-pct 2 is out of range: it must be > 0 and <= 1"),
        ("--interpolation cubic", "unknown interpolation 'cubic', did you mean 'bicubic'?"),
        ("--arch-kwargs num_classes", "Invalid value for '--arch-kwargs': 'num_classes' is not of the form key=value"),
        ("--at pathc", "unknown resize method 'pathc', did you mean 'patch'?"),
        ("--at stem", "at stem: say how far with --scale, such as --scale 0.75, or write stem@0.75"),
        ("--at input@0.5+after:layer1", "at input@0.5+after:layer1: say how far with --scale"),
        ("--at stem@0.5 --scale 0.75", "at stem@0.5: every place says its own scale, nothing is left for --scale"),
    ],
)
def test_a_wrong_request_is_one_line_exit_code_2_and_writes_nothing(
    pipeline, capsys, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)

    assert cli.execute(["build", "timm:resnet18", *options.split()]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"rdeploy build: {message}")
    assert err.count("\n") == 1
    assert pipeline.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_not_installed_is_exit_code_3(pipeline, capsys, monkeypatch):
    reason = "OpenVINO is not installed here; install it with: pip install 'rdeploy[cpu]'"
    monkeypatch.setattr(backends, "find", lambda name: types.SimpleNamespace(unavailable=lambda: reason))

    assert cli.execute(["build", "timm:resnet18", "--backend", "openvino"]) == 3
    assert capsys.readouterr().err == f"rdeploy build: backend openvino cannot build here: {reason}\n"


def test_an_output_folder_that_is_a_file_or_cannot_be_written_is_refused(pipeline, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")

    assert cli.execute(["build", "timm:resnet18", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "is a file, not a folder; choose another --out" in capsys.readouterr().err

    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("rdeploy.option_values.tempfile", types.SimpleNamespace(TemporaryFile=refuse))
    assert cli.execute(["build", "timm:resnet18", "--out", str(tmp_path)]) == 2
    assert "cannot be written to (Read-only file system); choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("calib", ["random", "my_package.images:batches"])
def test_calibration_without_a_folder_is_random_or_a_function(pipeline, capsys, calib):
    assert cli.execute(["build", "timm:resnet18", "--int8", "--calib", calib]) == 0
    assert only_request(pipeline).calib == calib


def test_the_table_fits_80_columns(pipeline, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    cli.execute(["build", "timm:resnet18"])

    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("native", "r6-int8", "openvino", "2.50x", "[2.45,", "50.0", "85.0", "96.0"):
        assert text in shown


def test_json_is_all_that_is_on_stdout(pipeline, capsys):
    cli.execute(["build", "timm:resnet18", "--json"])

    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    assert (variant["id"], variant["status"]) == ("r6-int8", "ok")
    assert variant["manifest"]["comparison"]["speedup"] == 2.5


def test_notes_and_an_engine_that_was_not_built_are_told_on_stderr_with_exit_code_1(pipeline, result, capsys):
    pipeline.answer = result

    assert cli.execute(["build", "timm:resnet18"]) == 1

    told = capsys.readouterr().err.splitlines()
    assert "r6-int8: snapped from 5 to 6" in told
    assert "40 images: ranges may not cover what the model will see" in told
    assert "rdeploy build: r6-int8 on reference: build: no such op (again with: rdeploy worker j)" in told


def test_a_variant_that_failed_is_exit_code_1_and_the_others_are_shown(pipeline, capsys):
    lost = Result(
        variant=Variant(resolution=(4, 4)),
        target="cpu",
        status="failed",
        failure=Failure(stage="export", error="StageError", message="op Foo"),
    )
    pipeline.answer = dataclasses.replace(pipeline.answer, variants=(*pipeline.answer.variants, lost))

    assert cli.execute(["build", "timm:resnet18"]) == 1

    out, err = capsys.readouterr()
    assert "r6-int8" in out
    assert "rdeploy build: r4-fp32: export: op Foo" in err


def test_an_engine_that_failed_verification_is_exit_code_1(pipeline, capsys):
    row = pipeline.answer.variants[0]
    refused = dataclasses.replace(row.engines[0].verification, passed=False, reasons=("the output is constant",))
    engines = (dataclasses.replace(row.engines[0], verification=refused), *row.engines[1:])
    pipeline.answer = dataclasses.replace(pipeline.answer, variants=(dataclasses.replace(row, engines=engines),))

    assert cli.execute(["build", "timm:resnet18"]) == 1
    assert "r6-int8 on onnxruntime: verify: the output is constant" in capsys.readouterr().err


def test_a_variant_that_cannot_be_is_exit_code_2(pipeline, capsys):
    failure = Failure(stage="resize", error="Unsupported", message="no stem")
    lost = Result(variant=Variant(resolution=(4, 4)), target="cpu", status="unsupported", failure=failure)
    pipeline.answer = dataclasses.replace(pipeline.answer, variants=(lost,))

    assert cli.execute(["build", "timm:resnet18"]) == 2
    assert "resize: no stem" in capsys.readouterr().err


def test_python_takes_the_same_options_and_writes_the_command_for_them(pipeline, tmp_path):
    answer = rdeploy.build(
        "timm:x",
        scale=0.75,
        int8=True,
        calib=tmp_path,
        native_resolution=(224, 256),
        mean=(0.5, 0.5, 0.5),
        batch=[1, 8],
    )

    assert answer is pipeline.answer
    command = (
        f"rdeploy build timm:x --scale 0.75 --int8 --calib {tmp_path} --native-resolution 224x256 "
        "--mean 0.5,0.5,0.5 --batch 1 --batch 8"
    )
    assert only_request(pipeline).command == command
    assert cli.execute(command.split()[1:]) == 0
    assert dataclasses.replace(pipeline.requests[1], command="") == dataclasses.replace(
        pipeline.requests[0], command=""
    )


def test_python_names_the_closest_option():
    with pytest.raises(rdeploy.errors.ConfigError, match="unknown option 'scales', did you mean 'scale'"):
        rdeploy.build("timm:x", scales=0.5)


def test_every_option_of_the_contract_is_one_of_the_command():
    offered = {option for parameter in build_verb.command.params for option in parameter.opts}
    contract = """--scale --resolution --at --fp32 --fp16 --int8 --calib --calib-samples --calibrator --data --task
        --mean --std --interpolation --crop-pct --native-resolution --target --backend --batch --out --seed --json
        --offline --arch --arch-kwargs --random-init --trust-pickle --debug"""

    assert set(re.findall(r"--\S+", contract)) <= offered


def test_how_to_adapt_and_fine_tune_arrives(pipeline, capsys, tmp_path):
    words = (
        f"build timm:x --scale 0.5 --adapt none --finetune {tmp_path} --finetune-epochs 3 --finetune-batch 32".split()
    )

    assert cli.execute([*words, "--finetune-rate", "0.001"]) == 0

    request = only_request(pipeline)
    assert request.adapt == "none"
    assert (request.finetune.data, request.finetune.epochs) == (str(tmp_path), 3)
    assert (request.finetune.batch, request.finetune.learning_rate) == (32, 0.001)
    assert request.finetune.optimizer == "adamw"


def test_the_optimizer_of_a_training_arrives_with_its_own_rate(pipeline, capsys, tmp_path):
    assert cli.execute(f"build timm:x --scale 0.5 --finetune {tmp_path} --finetune-optimizer sgd".split()) == 0

    assert (only_request(pipeline).finetune.optimizer, only_request(pipeline).finetune.learning_rate) == ("sgd", None)


def test_the_cheap_steps_are_tried_and_nothing_is_trained_unless_told(pipeline, capsys):
    assert cli.execute(["build", "timm:x", "--scale", "0.5"]) == 0

    assert (only_request(pipeline).adapt, only_request(pipeline).finetune) == ("auto", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--adapt xyz", "unknown adapt 'xyz'; there are: auto, full, none"),
        ("--finetune-epochs 3", "finetune-epochs says how to fine-tune: name the images with --finetune DIR"),
        ("--finetune nowhere --scale 0.5", "finetune nowhere: no such file or folder"),
        ("--finetune .", "finetune makes a lower resolution good: say which with --scale or --resolution"),
        ("--finetune . --scale 0.5 --finetune-rate 2", "finetune-rate 2 is out of range: it must be > 0 and <= 1"),
        (
            "--finetune . --scale 0.5 --finetune-optimizer sdg",
            "unknown finetune-optimizer 'sdg', did you mean 'sgd'?",
        ),
        ("--finetune . --scale 0.5 --finetune-batch 1", "finetune-batch 1 is out of range"),
    ],
)
def test_what_cannot_be_adapted_or_trained_so_is_refused(pipeline, capsys, words, message):
    assert cli.execute(["build", "timm:x", *words.split()]) == 2

    assert message in capsys.readouterr().err
    assert pipeline.requests == []
