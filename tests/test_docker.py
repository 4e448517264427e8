"""The images' files, linted by hadolint and read: what they promise, and that what they pin fits the package."""

import contextlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rdeploy import targets

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "Dockerfile", *sorted((ROOT / "docker").glob("*.Dockerfile"))]
pytestmark = pytest.mark.skipif(not (ROOT / "docker").is_dir(), reason="the tests are not run from a source tree")
names = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def load_script():
    spec = importlib.util.spec_from_file_location("check_installs", ROOT / "docker" / "check_installs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_installs"] = module
    spec.loader.exec_module(module)
    return module


def find_hadolint():
    for place in (Path(sys.executable).parent, Path(sys.prefix) / "bin"):
        if (place / "hadolint").is_file():
            return place / "hadolint"
    return shutil.which("hadolint")


def test_there_is_an_image_for_every_system():
    assert {file.name for file in FILES} == {
        "Dockerfile", "cpu.Dockerfile", "jetpack5.Dockerfile", "jetpack6.Dockerfile", "jetpack7.Dockerfile",
    }  # fmt: skip


@names
def test_hadolint_finds_nothing(file):
    hadolint = find_hadolint()
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install 'rdeploy[test]'")

    done = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


@names
def test_an_image_is_multi_stage_pinned_and_not_root(file):
    text = file.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)

    assert len(bases) >= 2
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001$", final, re.MULTILINE)
    assert 'ENTRYPOINT ["rdeploy"]' in final
    assert re.search(r'^HEALTHCHECK .*CMD \["rdeploy", "doctor"\]$', final, re.MULTILINE)


@names
def test_an_image_works_for_any_user_and_says_how_to_be_the_one_of_the_mounted_folder(file):
    text = file.read_text()
    comments = text[: text.index("FROM ")].replace("\\\n#", "")

    final = text[text.rindex("\nFROM ") :]
    assert "chmod 1777 /home/rdeploy /home/rdeploy/.cache /home/rdeploy/.cache/rdeploy" in final
    assert "HOME=/home/rdeploy USER=rdeploy RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy" in final
    runs = [line for line in comments.splitlines() if "docker run" in line and "-v " in line]
    assert runs
    assert all('--user "$(id -u):$(id -g)"' in line for line in runs)


def test_every_image_is_in_the_documentation():
    page = (ROOT / "docs" / "containers.md").read_text()

    for file in FILES:
        assert f"`{file.relative_to(ROOT)}`" in page
        assert f"-f {file.relative_to(ROOT)} ." in page or file.name == "Dockerfile"
    runs = [line for line in page.replace("\\\n", "").splitlines() if line.startswith("docker run") and "-v " in line]
    assert len(runs) >= 5
    assert all('--user "$(id -u):$(id -g)"' in line for line in runs)


def test_the_image_of_jetpack_7_has_the_tensorrt_of_its_profile():
    text = (ROOT / "docker" / "jetpack7.Dockerfile").read_text()
    target = targets.load("jetson-agx-orin-jp7")

    assert f"{target.tensorrt} with CUDA" in text[: text.index("FROM ")]


@names
def test_every_copied_path_exists(file):
    for words in re.findall(r"^COPY (?!--from)(.+)$", file.read_text(), re.MULTILINE):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source


@names
def test_every_install_names_its_constraints(file):
    found = load_script().installs(file)

    assert found
    for install in found:
        assert install.python, f"{install}: IMAGES in docker/check_installs.py does not know this base image"
        pinned = any("==" in word for word in install.words)
        assert pinned or (ROOT / install.words[install.words.index("-c") + 1]).is_file()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-py310.txt"])
def test_what_is_pinned_fits_what_the_package_asks_for(name):
    packaging = pytest.importorskip("packaging.requirements")
    lines = [line for line in (ROOT / "docker" / name).read_text().splitlines() if line and not line.startswith("#")]
    pinned = {}
    for line in lines:
        package, _, version = line.partition("==")
        assert version, line
        pinned[package.lower().replace("_", "-")] = version
    extras = ("", "gpu", "cpu", "torch", "zoo", "rtx") if name == "constraints.txt" else ("",)
    for text in importlib.metadata.requires("rdeploy"):
        requirement = packaging.Requirement(text)
        if requirement.name == "rdeploy" or not any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        version = pinned.get(requirement.name.lower().replace("_", "-"))
        assert version is not None or name == "constraints.txt", text
        assert version is None or requirement.specifier.contains(version), f"{text}: {name} pins {version}"


def command(script, line, machine="x86_64", python="3.12"):
    return script.Command(ROOT / "Dockerfile", tuple(line.split()), python, machine)


def test_every_kind_of_install_line_is_found(tmp_path):
    script = load_script()
    (tmp_path / "Dockerfile").write_text(
        "FROM python:3.12-slim AS build\nRUN apt-get update && apt-get install -y \\\n  gcc\n"
        "# RUN pip install not-this\nRUN python -m venv /opt/x && /opt/x/bin/pip install -c c.txt . ; useradd me\n"
        "FROM l4t-jetpack:r36\nRUN pip3 install numpy\n"
    )

    found = list(script.commands(tmp_path / "Dockerfile"))

    assert [(one.kind, one.arguments, one.machine) for one in found] == [
        ("apt", ("-y", "gcc"), "x86_64"),
        ("venv", ("/opt/x",), "x86_64"),
        ("pip", ("-c", "c.txt", "."), "x86_64"),
        ("pip", ("numpy",), "aarch64"),
    ]


def test_a_package_that_comes_along_must_be_pinned(tmp_path):
    (tmp_path / "c.txt").write_text("# pinned\ntyping_extensions==4.16.0\nPyYAML==6.0.4\n")

    found = load_script().unpinned(["typing-extensions==4.16.0", "pyyaml==6.0.4", "sympy==1.14.0"], tmp_path / "c.txt")

    assert found == ["sympy==1.14.0"]


IMAGE = {"python_version": "3.12", "python_full_version": "3.12.0", "platform_machine": "x86_64"}


def test_what_the_packages_here_bring_along_is_pinned():
    packaging = pytest.importorskip("packaging.requirements")
    wanted, seen = [("rdeploy", extra) for extra in ("", "cpu", "zoo", "rtx")], set()
    while wanted:
        name, extra = wanted.pop()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # another platform's, or not installed here
            for one in map(packaging.Requirement, importlib.metadata.requires(name) or ()):
                following = {(one.name, found) for found in ("", *one.extras)} - seen
                if one.marker is None or one.marker.evaluate({**IMAGE, "extra": extra}):
                    wanted += following
                    seen |= following

    names = sorted({f"{name}==0" for name, _ in seen if name != "rdeploy"})
    assert load_script().unpinned(names, ROOT / "docker" / "constraints.txt") == []


def test_apt_lines_are_simulated_where_apt_can(monkeypatch, tmp_path):
    script = load_script()
    line = command(script, "apt-get install -y --no-install-recommends python3-venv")
    monkeypatch.setattr(script, "APT_LISTS", tmp_path)
    ran = []
    monkeypatch.setattr(script, "_run", ran.append)

    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(script.NotRun, match="there is no apt-get here"):
        script.simulate_apt(line)
    monkeypatch.setattr(script.shutil, "which", lambda name: "/usr/bin/apt-get")
    with pytest.raises(script.NotRun, match="apt has no package lists here: apt-get update"):
        script.simulate_apt(line)
    (tmp_path / "deb_main_Packages.lz4").touch()
    assert script.simulate_apt(line).endswith("simulated")
    assert ran == [["apt-get", "install", "--simulate", "-y", "--no-install-recommends", "python3-venv"]]


def test_installing_is_left_to_the_machine_and_the_python_of_the_image(monkeypatch):
    script = load_script()
    monkeypatch.setattr(script.platform, "machine", lambda: "x86_64")

    with pytest.raises(script.NotRun, match="installs on aarch64, this is x86_64"):
        script.install(command(script, "pip install numpy", machine="aarch64"))
    with pytest.raises(script.NotRun, match=r"there is no Python 3.1 here"):
        script.install(command(script, "pip install numpy", python="3.1"))


@pytest.mark.slow
def test_an_install_that_fails_is_told_by_pips_own_words():
    script = load_script()
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"

    with pytest.raises(script.Failed, match="nothing-of-that-name"):
        script.install(command(script, "pip install --no-index nothing-of-that-name", platform.machine(), here))


def test_each_line_has_its_outcome_and_one_that_fails_the_exit_code(monkeypatch, capsys):
    script = load_script()

    def refuse(line):
        raise script.Failed("no such version")

    def skip(line):
        raise script.NotRun("no apt-get")

    monkeypatch.setattr(script, "resolve", refuse)
    monkeypatch.setattr(script, "simulate_apt", skip)
    monkeypatch.setattr(script, "try_venv", lambda line: "made")

    assert script.main([str(ROOT / "docker" / "jetpack6.Dockerfile")]) == 1
    said = capsys.readouterr().out
    assert re.findall(r"^\S+", said, re.MULTILINE) == ["not", "ok", "FAILED"]
    assert "         no such version" in said


def test_what_pip_installs_is_what_is_resolved():
    words = ["--no-cache-dir", "-c", "docker/constraints.txt", ".[gpu,zoo]", "onnxruntime", "cuda-bindings"]

    wanted, options = load_script().requirements(words)

    assert wanted == "onnxruntime\ncuda-bindings"
    assert options[:2] == ["--constraints", str(ROOT / "docker" / "constraints.txt")]
    assert options[2:] == [str(ROOT / "pyproject.toml"), "--extra=gpu", "--extra=zoo"]
