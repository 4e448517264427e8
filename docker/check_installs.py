"""Run every `pip install` of the Dockerfiles as far as a machine without Docker can: resolve it, install nothing.

    python docker/check_installs.py [Dockerfile ...]

Each line is resolved for the image's own platform and Python with the constraints that it names, from the package index that
pip uses here: a version that does not exist, has no wheel for that platform, or contradicts another, fails. `.` stands for
this repository's dependencies. Only metadata is read (uv's resolver): the wheels are gigabytes. What needs an index of
NVIDIA's is tried, and reported where it cannot be reached; `apt-get` lines need the image. The exit code is 1 when a line fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = (
    ("python:3.12", "3.12", "x86_64"),
    ("python:3.10", "3.10", "aarch64"),
    ("l4t-jetpack:r36", "3.10", "aarch64"),
    ("nvidia/tensorrt:", "3.12", "aarch64"),
)
"""A part of the image's name, the Python that is in it, the machine that it is for."""
GLIBC = {"3.12": 36, "3.10": 31}
"""The minor version of the C library of the oldest image with that Python."""
NVIDIAS = ("tensorrt-cu", "tensorrt==")


@dataclass(frozen=True)
class Install:
    """One `pip install`: where it stands, its words, and what it is for."""

    file: Path
    words: tuple[str, ...]
    python: str
    machine: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)} ({self.machine}, Python {self.python}): pip install {shlex.join(self.words)}"


def installs(file: Path) -> list[Install]:
    """Return the `pip install` lines of a Dockerfile, with the platform of the stage that they stand in."""
    found: list[Install] = []
    python, machine = "", ""
    text = re.sub(r"\\\n", " ", "".join(line for line in file.open() if not line.lstrip().startswith("#")))
    for line in text.splitlines():
        if line.startswith("FROM "):
            python, machine = next(((p, m) for part, p, m in IMAGES if part in line), ("", ""))
        if not line.startswith("RUN "):
            continue
        for command in re.split(r"&&|;", line.removeprefix("RUN ")):
            words = shlex.split(command)
            if len(words) > 2 and words[0].rpartition("/")[2].startswith("pip") and words[1] == "install":
                found.append(Install(file, tuple(words[2:]), python, machine))
    return found


def requirements(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return uv's requirements on its standard input and its options; `.[extra]` is this repository's pyproject.toml."""
    wanted, options = [], []
    remaining = iter(words)
    for word in remaining:
        own = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
        if word == "-c":
            options += ["--constraints", str(ROOT / next(remaining))]
        elif own:
            options += [
                str(ROOT / "pyproject.toml"),
                *(f"--extra={extra}" for extra in (own[1] or "").split(",") if extra),
            ]
        elif not word.startswith("-"):
            wanted.append(word)
    return "\n".join(wanted), options


def resolve(install: Install) -> str | None:
    """Resolve one line from the metadata of the packages alone; return the reason where it cannot be."""
    wanted, options = requirements(install.words)
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-cache", "--no-header", "--only-binary=:all:",
        f"--python-version={install.python}", f"--python-platform={install.machine}-manylinux_2_{GLIBC[install.python]}",
        *options, "-",
    ]  # fmt: skip
    if index := os.environ.get("PIP_INDEX_URL"):
        command.append(f"--default-index={index}")
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else " ".join(done.stderr.split())


def main(files: list[str]) -> int:
    paths = [Path(file).resolve() for file in files] or [
        ROOT / "Dockerfile",
        *sorted((ROOT / "docker").glob("*.Dockerfile")),
    ]
    failed = 0
    for install in [one for path in paths for one in installs(path)]:
        reason = resolve(install)
        if reason is None:
            print(f"ok       {install}")
        elif any(word.startswith(NVIDIAS) for word in install.words):
            print(f"not run  {install}\n         needs NVIDIA's index: {reason}")
        else:
            failed += 1
            print(f"FAILED   {install}\n         {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
