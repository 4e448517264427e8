import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdeploy import api, cli, doctor
from rdeploy.cli import console
from rdeploy.errors import ConfigError, MissingDependency, StageError

HEAVY = (
    "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "numpy", "scipy", "PIL", "yaml", "timm",
    "torchvision", "tensorrt", "tensorrt_rtx_bindings", "psutil", "rich",
)  # fmt: skip


def loaded_by(code):
    """Return which heavy packages are loaded after `code` ran in a fresh interpreter."""
    program = f"import sys\n{code}\nsys.stderr.write(' '.join(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stderr.split()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["build", "--help"], ["run", "-h"], ["inspect", "-h"], []]
)
def test_help_loads_no_heavy_package(arguments):
    assert loaded_by(f"from rdeploy.cli import execute; assert execute({arguments}) == 0") == []


def test_importing_the_package_loads_no_heavy_package():
    assert loaded_by("import rdeploy; rdeploy.__version__; dir(rdeploy)") == []


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_of_the_help_is_there_and_explains_itself(verb, capsys):
    assert cli.execute([verb, "--help"]) == 0
    assert f"Usage: rdeploy {verb}" in capsys.readouterr().out


@pytest.fixture
def failing(monkeypatch):
    """Make `rdeploy build` fail in a given way."""

    def fail_with(error):
        def build(*args, **kwargs):
            raise error

        monkeypatch.setattr(api, "build", build)

    return fail_with


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("no such file\nreally"), 2, "rdeploy build: no such file really\n"),
        (MissingDependency("no x", install="pip i x"), 3, "rdeploy build: no x; install it with: pip i x\n"),
        (StageError("export", "op Foo"), 1, "rdeploy build: export: op Foo\n"),
        (KeyboardInterrupt(), 130, "rdeploy: interrupted\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            3,
            "rdeploy build: torch is not installed; install it with: pip install 'rdeploy[torch]'\n",
        ),
    ],
)  # fmt: skip
def test_an_error_is_one_line_on_stderr_and_an_exit_code(failing, capsys, error, code, line):
    failing(error)

    assert cli.execute(["build", "timm:resnet18"]) == code
    assert capsys.readouterr() == ("", line)


def test_an_interrupt_while_python_runs_a_string_has_its_exit_code(tmp_path):
    """Python remembers it, and ends itself by SIGINT even after `sys.exit(130)`."""
    (tmp_path / "interrupted.py").write_text(
        "import atexit, sys\nfrom rdeploy import api, cli\n"
        "api.build = lambda *args, **kwargs: exec('raise KeyboardInterrupt')\n"
        "atexit.register(print, 'left in order')\n"
        "sys.argv = ['rdeploy', 'build', 'timm:resnet18']\ncli.main()\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])

    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout, done.stderr) == (130, "left in order\n", "rdeploy: interrupted\n")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), EOFError("read past the end"), RuntimeError()]
)
def test_an_unexpected_error_is_one_line_that_says_where_and_what_to_do(failing, capsys, error):
    failing(error)

    assert cli.execute(["build", "timm:resnet18"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("rdeploy build: unexpected error in rdeploy/cli/")
    assert "run it again with --debug for the traceback, and please report it" in message


@pytest.mark.parametrize("arguments", [["--debug", "build", "x"], ["build", "x", "--debug"]])
def test_debug_shows_the_traceback(failing, capsys, arguments):
    failing(ConfigError("no such file"))

    assert cli.execute(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback (most recent call last)" in message
    assert message.endswith("rdeploy build: no such file\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["biuld"], "rdeploy: no such verb 'biuld', did you mean 'build'?; there are: build,"),
        (["build"], "rdeploy build: Missing argument 'MODEL'."),
        (["build", "x", "--scal", "1"], "rdeploy build: No such option"),
        (["run", "x"], "rdeploy run: Missing argument 'IMAGE...'"),
        (["run", "x", "y", "--top", "0"], "rdeploy run: Invalid value for '--top'"),
        (["evaluate", "x"], "rdeploy evaluate: Missing option '--data'"),
        (["--nonsense"], "rdeploy: No such option"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert cli.execute(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_what_libraries_print_reaches_neither_stdout_nor_stderr(capfd):
    with console.progress("working", verbose=False) as show:
        show("still working")
        os.write(1, b"vendor banner\n")
        os.write(2, b"vendor warning\n")
        print("python chatter")
    console.print_json({"a": 1})

    assert capfd.readouterr() == ('{\n  "a": 1\n}\n', "")


def test_with_debug_what_libraries_print_goes_to_stderr(capfd):
    with console.progress("working", verbose=True):
        os.write(1, b"vendor banner\n")
    console.print_json({})

    assert capfd.readouterr() == ("{}\n", "vendor banner\n")


def test_stdout_is_back_after_an_error(capfd):
    with pytest.raises(ValueError, match="x"), console.progress("working", verbose=False):
        raise ValueError("x")
    print("data")

    assert capfd.readouterr().out == "data\n"


def test_schema_prints_the_schema_that_ships_with_the_package(capsys):
    assert cli.execute(["schema", "manifest"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "rdeploy bundle manifest"
    assert cli.execute(["schema", "manifets"]) == 2
    assert (
        capsys.readouterr().err
        == "rdeploy schema: unknown schema 'manifets', did you mean 'manifest'?; there are: baseline, manifest\n"
    )


def test_targets_lists_every_profile_with_what_it_is(capsys):
    assert cli.execute(["targets"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("this machine: ")
    assert "\ncpu " in shown

    assert cli.execute(["targets", "--json"]) == 0
    assert "cpu" in [profile["name"] for profile in json.loads(capsys.readouterr().out)]


def test_targets_shows_one_profile_and_refuses_an_unknown_one(capsys):
    assert cli.execute(["targets", "cpu"]) == 0
    assert "backends: [onnxruntime, openvino]" in capsys.readouterr().out
    assert cli.execute(["targets", "gpu"]) == 2
    assert "unknown target 'gpu'" in capsys.readouterr().err


def test_doctor_shows_each_backend_with_its_fix(capsys, monkeypatch):
    good = doctor.Diagnosis(name="openvino", kind="backend", status="pass", detail="2026.1")
    bad = doctor.Diagnosis(name="tensorrt", kind="backend", status="fail", detail="not here", fix="pip install it")
    monkeypatch.setattr(doctor, "diagnose", lambda: (good, bad))

    assert cli.execute(["doctor"]) == 0
    assert (
        capsys.readouterr().out
        == "PASS  openvino  2026.1\nFAIL  tensorrt  not here\n                fix: pip install it\n"
    )


def test_doctor_says_with_its_exit_code_that_nothing_works(capsys, monkeypatch):
    bad = doctor.Diagnosis(name="tensorrt", kind="backend", status="fail", detail="not here", fix="pip install it")
    monkeypatch.setattr(doctor, "diagnose", lambda: (bad,))

    assert cli.execute(["doctor", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)[0]["fix"] == "pip install it"


def test_a_job_file_that_is_none_is_one_line(capsys, tmp_path):
    assert cli.execute(["worker", str(tmp_path / "absent.json")]) == 2
    assert "cannot read the job" in capsys.readouterr().err


def test_python_dash_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "rdeploy", "nonsense"], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.startswith("rdeploy: no such verb")
