"""Run every install line of the Dockerfiles as far as a machine without Docker can: resolve and simulate, install nothing.

    python docker/check_installs.py [--install] [Dockerfile ...]

`pip install` is resolved for the image's own platform and Python with the constraints that the line names, from the package
index that pip uses here: a version that does not exist, has no wheel for that platform, or contradicts another, fails, and so
does a package that would come along and is not in the constraints. `.` stands for this repository's dependencies. Only
metadata is read (uv's resolver): the wheels are gigabytes. What needs an index of NVIDIA's is tried, and reported where it
cannot be reached. With --install, lines for this machine's platform are really installed, each into an environment that is
thrown away. `apt-get install` is simulated by this system's apt, where it has package lists: the names, not the image's
versions. `python -m venv` is run. The exit code is 1 when a line fails.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
APT_LISTS = Path("/var/lib/apt/lists")


class Failed(Exception):
    """A line does not do what it should; the sentence says why."""


class NotRun(Exception):
    """A line cannot be run here; the sentence says why."""


@dataclass(frozen=True)
class Command:
    """One command of a `RUN` line: where it stands, its words, and what it is for."""

    file: Path
    words: tuple[str, ...]
    python: str
    machine: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)} ({self.machine}, Python {self.python}): {shlex.join(self.words)}"

    @property
    def kind(self) -> str:
        """Return pip, apt or venv for a line that installs, "" for any other."""
        program = self.words[0].rpartition("/")[2]
        if "install" in self.words[1:3] and program in ("pip", "pip3", "apt-get"):
            return "apt" if program == "apt-get" else "pip"
        return "venv" if program.startswith("python") and self.words[1:3] == ("-m", "venv") else ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return what is behind `install`, or behind `-m venv`."""
        return self.words[3:] if self.kind == "venv" else self.words[self.words.index("install") + 1 :]


def commands(file: Path) -> Iterator[Command]:
    """Yield the commands of a Dockerfile that install, with the platform of the stage that they stand in."""
    python, machine = "", ""
    text = re.sub(r"\\\n", " ", "".join(line for line in file.open() if not line.lstrip().startswith("#")))
    for line in text.splitlines():
        if line.startswith("FROM "):
            python, machine = next(((p, m) for part, p, m in IMAGES if part in line), ("", ""))
        if not line.startswith("RUN "):
            continue
        for words in map(shlex.split, re.split(r"&&|;", line.removeprefix("RUN "))):
            if words and (command := Command(file, tuple(words), python, machine)).kind:
                yield command


def installs(file: Path) -> list[Command]:
    """Return the `pip install` lines of a Dockerfile."""
    return [command for command in commands(file) if command.kind == "pip"]


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


def resolve(command: Command) -> str:
    """Resolve a `pip install` from the metadata of the packages alone; say how many packages it is.

    Raises:
        Failed: it cannot be resolved, or brings what is not pinned.
        NotRun: it needs NVIDIA's index, which is not reached here.
    """
    wanted, options = requirements(command.arguments)
    uv = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-cache", "--no-header", "--no-annotate",
        "--only-binary=:all:", f"--python-version={command.python}",
        f"--python-platform={command.machine}-manylinux_2_{GLIBC[command.python]}", *options, "-",
    ]  # fmt: skip
    if index := os.environ.get("PIP_INDEX_URL"):
        uv.append(f"--default-index={index}")
    done = subprocess.run(uv, input=wanted, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _refused(command, " ".join(done.stderr.split()))
    found = done.stdout.split()
    if "--constraints" in options:
        file = Path(options[options.index("--constraints") + 1])
        if missing := unpinned(found, file):
            raise Failed(f"{file.relative_to(ROOT)} does not pin what comes along; add: {' '.join(missing)}")
    return f"{len(found)} packages"


def _refused(command: Command, reason: str) -> Exception:
    is_nvidias = any(word.startswith(NVIDIAS) for word in command.words)
    return NotRun(f"needs NVIDIA's index: {reason}") if is_nvidias else Failed(reason)


def unpinned(found: Sequence[str], file: Path) -> list[str]:
    """Return those of the `name==version` that a file of constraints does not hold."""
    pinned = {_name(line) for line in file.read_text().splitlines() if not line.startswith("#")}
    return [one for one in found if _name(one) not in pinned]


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


def install(command: Command) -> str:
    """Really run a `pip install`, in an environment of the image's Python that is thrown away.

    Raises:
        Failed: pip fails.
        NotRun: the line is for another machine, there is no such Python here, or NVIDIA's index is not reached.
    """
    if command.machine != platform.machine():
        raise NotRun(f"installs on {command.machine}, this is {platform.machine()}")
    with tempfile.TemporaryDirectory() as place:
        _run([_python(command.python), "-m", "venv", place])
        pip = [f"{place}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        try:
            _run([*pip, "install", "--quiet", *command.arguments])
        except Failed as failed:
            raise _refused(command, str(failed)) from failed
        _run([*pip, "check"])
    return "installed"


def _python(version: str) -> str:
    for python in (sys.executable, f"python{version}"):
        if shutil.which(python) is None:
            continue
        asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return python
    raise NotRun(f"there is no Python {version} here")


def simulate_apt(command: Command) -> str:
    """Let this system's apt say whether it would install the packages.

    Raises:
        Failed: it would not.
        NotRun: there is no apt here, or it has no package lists.
    """
    if shutil.which("apt-get") is None:
        raise NotRun("there is no apt-get here")
    if not any(APT_LISTS.glob("*_Packages*")):
        raise NotRun("apt has no package lists here: apt-get update")
    _run(["apt-get", "install", "--simulate", *command.arguments])
    return "by this system's apt, simulated"


def try_venv(command: Command) -> str:
    """Make an environment as the line does, with this Python, elsewhere.

    Raises:
        Failed: it cannot be made, or has no pip.
    """
    _make_venv(tuple(word for word in command.arguments if word.startswith("-")))
    return "made with this Python"


@functools.cache
def _make_venv(options: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as place:
        _run([sys.executable, "-m", "venv", *options, place])
        _run([f"{place}/bin/pip", "--version"])


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(" ".join((done.stderr.strip() or done.stdout.strip()).split())[-500:])


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    paths = options.files or [ROOT / "Dockerfile", *sorted((ROOT / "docker").glob("*.Dockerfile"))]
    ways = {"pip": install if options.install else resolve, "apt": simulate_apt, "venv": try_venv}
    failed = 0
    for command in [one for path in paths for one in commands(path.resolve())]:
        try:
            print(f"ok       {command}: {ways[command.kind](command)}", flush=True)
        except NotRun as reason:
            print(f"not run  {command}\n         {reason}", flush=True)
        except Failed as reason:
            failed += 1
            print(f"FAILED   {command}\n         {reason}", flush=True)
    return 1 if failed else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="Dockerfile", help="all of them by default")
    parser.add_argument("--install", action="store_true", help="really install what is for this machine: gigabytes")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
