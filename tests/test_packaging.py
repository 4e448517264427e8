"""The wheel and the sdist, built from the tree, pass `twine check` and work away from it."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MISSING = [name for name in ("build", "hatchling", "twine") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)} (pip install 'rdeploy[test]')"),
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests are not run from a source tree"),
]


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is made from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A virtual environment with the wheel; the dependencies are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1])
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def execute(program, *words):
        return run(python.with_name(program), *words, cwd=folder, env=environment)

    return execute


def test_both_pass_twine_check(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_holds_the_package_its_data_and_its_licence_only(built):
    names = zipfile.ZipFile(built[1]).namelist()

    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"rdeploy"}
    assert {
        "rdeploy/py.typed",
        "rdeploy/probe.onnx",
        "rdeploy/schemas/manifest.schema.json",
        "rdeploy/schemas/baseline.schema.json",
    } <= set(names)
    assert {f"rdeploy/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.yaml")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_is_needed_to_build_and_test_again(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert {"pyproject.toml", "README.md", "LICENSE", "tests/test_packaging.py", "profiles/cpu.yaml"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".whl", ".gz"))]


def test_the_installed_package_is_the_wheels(installed):
    place = installed("python", "-c", "import rdeploy; print(rdeploy.__file__)")

    assert "elsewhere" in place


def test_profiles_are_found_away_from_the_clone(installed):
    found = [profile["name"] for profile in json.loads(installed("rdeploy", "targets", "--json"))]

    assert found == sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))


def test_the_schema_is_found_away_from_the_clone(installed):
    assert json.loads(installed("rdeploy", "schema", "manifest"))["title"] == "rdeploy bundle manifest"


def test_the_version_is_one(installed):
    metadata = installed("python", "-c", "from importlib.metadata import version; print(version('rdeploy'))")

    assert installed("rdeploy", "--version").split()[-1] == metadata.strip()
