"""Every command of the README and the guide is executed, in a folder with what it speaks of; exceptions say why not."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from rdeploy.cli import execute

from . import doc_sandbox as sandbox

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(sh|bash|console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_HERE = {
    r"^make (demo|check) ": "sets up an environment of its own: CI's jobs run both",
    r"^pip install ": "changes what is installed",
    r"^ray start ": "starts a service that stays: tests/e2e/test_scale_out.py runs a cluster",
    r"--workers ray://": "needs a second machine: tests/e2e/test_scale_out.py runs a cluster here",
    r"build-engine\.sh": "needs TensorRT's trtexec: tests/test_trtexec.py runs the script with a stand-in",
    r"tensorrt\.cpp": "needs the headers of TensorRT and CUDA",
    r"--target mine\.yaml": "needs TensorRT: tests/backends/test_tensorrt.py reads such options with a stand-in",
    r"run-tensorrt": "needs an NVIDIA GPU",
    r"^docker ": "needs a Docker engine: tests/test_docker.py reads the files",
    r"^python docker/check_installs": "asks the package index: CI runs it, tests/test_docker.py its parts",
    r"^tritonserver ": "is Triton's container",
}
SHORTER = {
    "--time-budget 20m": "--time-budget 10s",
    "--int8 --calib": "--int8 --recipe fast --calib",
    "--finetune unlabelled/": "--finetune unlabelled/ --finetune-epochs 2",
}
"""What a reader has time for and a test has not."""
ALLOWED = {
    "check": (0, 4),  # on a busy machine an interval may hold the budget
    "doctor": (0, 3),  # 3 says that a backend of the bundle is not installed on this machine
}


def blocks(page):
    for kind, text in FENCE.findall(page.read_text()):
        if kind == "python":
            yield kind, text
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ")
            if command and not command.startswith("#"):
                yield kind, command


def reason_not_to(command):
    return next((why for pattern, why in NOT_HERE.items() if re.search(pattern, f"{command} ")), None)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with everything, made once, and copied by each page."""
    for name in ("torch", "timm", "torchvision", "onnxruntime", "openvino"):
        pytest.importorskip(name, reason="the guide's commands need pip install 'rdeploy[cpu,zoo,report]'")
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _enter(monkeypatch, folder)
        sandbox.fill(folder)
        sandbox.substitute(monkeypatch, folder / "weights.pt")
        sandbox.build(folder)
    return folder


def _enter(monkeypatch, folder):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RDEPLOY_CACHE", str(folder / "cache"))
    monkeypatch.setenv("GIT_COMMIT", "abc123")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))], ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_they_say(page, prepared, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "guide"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("cache"))
    _enter(monkeypatch, folder)
    monkeypatch.setenv("RDEPLOY_CACHE", str(prepared / "cache"))
    (folder / "examples").symlink_to(ROOT / "examples")
    sandbox.substitute(monkeypatch, folder / "weights.pt")
    failed = []
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, str(page), "exec"), {"__name__": "guide"})
        elif reason_not_to(text) is None:
            code = _run(text)
            if code not in ALLOWED.get(text.split()[1], (0,)):
                failed.append((code, text, capsys.readouterr().err[-600:]))
        capsys.readouterr()

    assert failed == []


def _run(text):
    for said, done in SHORTER.items():
        text = text.replace(said, done)
    words = shlex.split(os.path.expandvars(text), comments=True)
    if words[0] == "rdeploy":
        return execute(words[1:])
    if words[0] == "g++" and shutil.which("g++") is None:
        return 0
    return subprocess.run(words, timeout=120, check=False).returncode


def test_every_exception_is_still_needed():
    commands = [f"{text} " for page in PAGES for kind, text in blocks(page) if kind != "python"]

    assert [pattern for pattern in NOT_HERE if not any(re.search(pattern, one) for one in commands)] == []
