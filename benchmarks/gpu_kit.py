"""TensorRT 8.6.0 with a Python that imports it: packed for a GPU host without package access, or made on one that has it.

    python3.10 benchmarks/gpu_kit.py pack OUT [--part-mb 56]     where packages can be had; run it with the Python to travel
    python benchmarks/gpu_kit.py cut FOLDER [--part-mb 56]       what is larger in a folder (wheels, graphs) becomes parts
    python benchmarks/gpu_kit.py join FOLDER                     on the host: check, join, unpack, stub, write trt-python

TensorRT 8.6.0 is the only whole TensorRT, builder included, that PyPI carries; it needs Python 3.6 to 3.10 and knows GPUs up
to Hopper. Its plugin library links cuBLAS 12 and cuDNN 8 by name; the builder does not need them with those tactic sources
off, so stubs of these names satisfy the import. A stub that is called prints its name and aborts: none is used silently.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import gpu_parts
import gpu_wheels

NAME, RUNNER, WHEEL = "kit.tar.xz", "trt-python", "tensorrt-8.6.0-"
PACKAGES = (
    "tensorrt==8.6.0", "numpy<2.3", "cuda-bindings==12.9.*", "cuda-pathfinder", "platformdirs", "PyYAML", "psutil", "click",
)  # fmt: skip
_VERSION = (3, 10)
_PLUGIN = "libnvinfer_plugin.so.8"
_LEFT_OUT = ("__pycache__", "test", "tests", "idlelib", "tkinter", "site-packages", "ensurepip", "lib2to3")
_BROUGHT_ALONG = ("libffi", "libz.", "libbz2", "liblzma", "libcrypto", "libssl", "libuuid")
"""Libraries of the system that the standard library links and that another system may have in another version, or not."""
_RUNNER = """#!/bin/sh
{home}export PYTHONPATH="{sites}:$PYTHONPATH"
export LD_LIBRARY_PATH="{libraries}:$LD_LIBRARY_PATH"
exec "{python}" "$@"
"""


class NoKit(Exception):
    """There is no TensorRT 8.6.0 to run; the sentence says why, and what helps."""


def pack_folder(folder: Path, out: Path, part_mb: float) -> list[Path]:
    """Write `folder` as `kit` into numbered parts with their checksums; return the parts."""
    out.mkdir(parents=True, exist_ok=True)
    parts = gpu_parts.Parts(out / NAME, int(part_mb * 2**20))
    with lzma.open(parts, "wb", preset=2) as compressed, tarfile.open(fileobj=compressed, mode="w|") as archive:
        archive.add(folder, "kit")
    parts.close()
    gpu_parts.note_sums(out, parts.paths)
    return parts.paths


def pack(out: Path, part_mb: float) -> list[Path]:
    """Pack TensorRT 8.6.0, what rdeploy needs beside it, and the Python that runs this.

    Raises:
        NoKit: this is another Python than 3.10, or pip fails.
    """
    if sys.version_info[:2] != _VERSION:
        raise NoKit("run this with Python 3.10: TensorRT 8.6.0 has wheels for 3.6 to 3.10 only")
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        kit = Path(work) / "kit"
        _install(sys.executable, kit / "site")
        with contextlib.suppress(NoKit):  # without nm and gcc here, the host makes them
            write_stubs(kit / "site" / "tensorrt", kit / "site" / "tensorrt")
        copy_python(Path(sys.base_prefix), kit / "python")
        return pack_folder(kit, out, part_mb)


def _install(python: str, site: Path) -> None:
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--target", site, *PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoKit(f"pip did not install {PACKAGES[0]}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")


def copy_python(prefix: Path, home: Path) -> None:
    """Copy an interpreter with its standard library."""

    def left_out(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name in _LEFT_OUT or name.endswith((".a", ".pyc"))]

    shutil.copytree(prefix / "lib" / "python3.10", home / "lib" / "python3.10", ignore=left_out, symlinks=True)
    for library in (prefix / "lib").glob("libpython3.10*.so*"):
        shutil.copy2(library, home / "lib", follow_symlinks=False)
    for library in linked(home / "lib" / "python3.10" / "lib-dynload"):
        if library.name.startswith(_BROUGHT_ALONG):
            shutil.copy2(library, home / "lib")
    (home / "bin").mkdir()
    shutil.copy2(os.path.realpath(prefix / "bin" / "python3.10"), home / "bin" / "python3.10")


def linked(folder: Path) -> list[Path]:
    """Return the libraries that the extension modules in a folder link, as the loader finds them here."""
    found: set[Path] = set()
    for module in folder.glob("*.so"):
        listed = subprocess.run(["ldd", module], capture_output=True, text=True, check=False).stdout
        found |= {
            Path(words[2]) for words in map(str.split, listed.splitlines()) if len(words) > 2 and words[1] == "=>"
        }
    return sorted(path for path in found if path.is_file())


def brought(folder: Path, place: Path) -> Path:
    """Return the `trt-python` for what a folder brings: a packed kit, or TensorRT's own wheel and a Python that it is for.

    The folder is left as it is. Its other wheels that fit that Python are importable too: a kit may lack some.

    Raises:
        NoKit: neither is there, or something is missing for it.
        gpu_parts.Damaged: a part of it is not what it was.
    """
    if (folder / "kit").is_dir() or gpu_parts.names(folder, NAME):
        return join(folder, place)
    for wheel in gpu_parts.names(folder, ".whl"):
        if wheel.startswith(WHEEL) and gpu_wheels.fits(wheel, version := _version_of(wheel)):
            python = find_python(version)
            site, problems = _site(folder, version, place)
            if problems:
                raise NoKit("; ".join(problems))
            return write_runner(place, python, [site])
    raise NoKit(f"the folder {folder} has neither the parts {NAME}.000 and so on, nor a wheel of TensorRT 8.6.0")


def _version_of(wheel: str) -> gpu_wheels.Version:
    tag = wheel.split("-")[-3]
    return int(tag[2]), int(tag[3:])


def _site(folder: Path, version: gpu_wheels.Version, place: Path) -> tuple[Path, list[str]]:
    fitting = [wheel for wheel in gpu_parts.names(folder, ".whl") if gpu_wheels.fits(wheel, version)]
    site = place / "site"
    return site, gpu_wheels.site(folder, fitting, site)


def find_python(version: gpu_wheels.Version) -> str:
    """Return a Python of a version.

    Raises:
        NoKit: none starts here.
    """
    number = ".".join(map(str, version))
    for python in (sys.executable, f"python{number}"):
        asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == number:
            return python
    raise NoKit(f"TensorRT 8.6.0 needs Python {number} there, and none is here: bring a kit, which has its own")


def fetch(place: Path) -> Path:
    """Install TensorRT 8.6.0 with pip into `place`, once, for a Python 3.10 that is here; return the `trt-python`.

    Raises:
        NoKit: there is no such Python, or pip cannot install it.
    """
    python, site = find_python(_VERSION), place / "fetched"
    if not site.is_dir():
        partial = place / "fetching"
        shutil.rmtree(partial, ignore_errors=True)
        _install(python, partial)
        partial.rename(site)
    return write_runner(place, python, [site])


def join(folder: Path, place: Path) -> Path:
    """Return the `trt-python` of a packed kit; it is unpacked into `place`, once, where it was not unpacked in its folder.

    Raises:
        NoKit: it is no kit, or its libraries cannot be completed here.
        gpu_parts.Damaged: a part is missing or damaged.
    """
    kit = folder / "kit"
    if not kit.is_dir():
        kit = place / "kit"
        if not kit.is_dir():
            _unpack(folder, place)
    extra, _ = _site(folder, _VERSION, place)
    return write_runner(place, str(kit / "python" / "bin" / "python3.10"), [kit / "site", extra], home=kit / "python")


def _unpack(folder: Path, place: Path) -> None:
    partial, parts = place / "unpacking", gpu_parts.checked(folder, NAME)
    shutil.rmtree(partial, ignore_errors=True)
    # The checksums are ours, and the links of a Python are many; Pythons before 3.10.12 know no filter and need none.
    trust = {"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}
    try:
        with (
            lzma.open(io.BufferedReader(gpu_parts.Joined(parts)), "rb") as content,
            tarfile.open(fileobj=content, mode="r|") as archive,
        ):
            archive.extractall(partial, **trust)
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise NoKit(f"{parts[0]} and its further parts are no archive of a kit: {error}") from error
    (partial / "kit").rename(place / "kit")


def write_runner(place: Path, python: str, sites: list[Path], *, home: Path | None = None) -> Path:
    """Write the script that starts `python` with the packages in `sites`, and TensorRT's libraries with stubs, found."""
    tensorrt, stubs = sites[0] / "tensorrt", place / "stubs"
    libraries = [tensorrt, stubs, *([home / "lib"] if home else [])]
    if (tensorrt / _PLUGIN).is_file() and not any(tensorrt.glob("libcudnn.so.*")):
        write_stubs(tensorrt, stubs)
    runner = place / RUNNER
    place.mkdir(parents=True, exist_ok=True)
    runner.write_text(
        _RUNNER.format(
            home=f'export PYTHONHOME="{home}"\n' if home else "",
            sites=os.pathsep.join(map(str, sites)),
            libraries=os.pathsep.join(map(str, libraries)),
            python=python,
        )
    )
    runner.chmod(0o755)
    return runner


def write_stubs(tensorrt: Path, place: Path) -> dict[str, int]:
    """Compile a stub for every cuBLAS and cuDNN library that the plugins link; return how many functions each has.

    Raises:
        NoKit: there is no nm or no gcc, or it fails.
    """
    wanted: dict[str, set[str]] = collections.defaultdict(set)
    for line in _said(["nm", "-D", "--undefined-only", str(tensorrt / _PLUGIN)]).splitlines():
        symbol, _, library = line.split()[-1].replace("@@", "@").partition("@")
        if library.startswith(("libcublas", "libcudnn")):
            wanted[library].add(symbol)
    place.mkdir(parents=True, exist_ok=True)
    for library, symbols in wanted.items():
        functions = [f'void {s}(void) {{ fputs("stub called: {s}\\n", stderr); abort(); }}\n' for s in sorted(symbols)]
        script = place / f"{library}.map"
        script.write_text(f"{library} {{ global: *; }};\n")
        linked = [f"-Wl,-soname,{library}", f"-Wl,--version-script={script}", "-o", str(place / library)]
        source = "#include <stdio.h>\n#include <stdlib.h>\n" + "".join(functions)
        _said(["gcc", "-shared", "-fPIC", "-x", "c", "-", *linked], source)
        script.unlink()
    return {library: len(symbols) for library, symbols in wanted.items()}


def _said(command: list[str], source: str = "") -> str:
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoKit(
            f"TensorRT 8.6.0 needs stub libraries, and {command[0]} does not start: {error.strerror}"
        ) from error
    if done.returncode != 0:
        raise NoKit(
            f"TensorRT 8.6.0 needs stub libraries, and {command[0]} fails: {' '.join(done.stderr.split())[:300]}"
        )
    return done.stdout


def main() -> None:
    options = _options()
    try:
        if options.action == "join":
            print(brought(options.folder.resolve(), options.folder.resolve()))
            return
        made = pack(options.folder.resolve(), options.part_mb) if options.action == "pack" else None
        parts = gpu_parts.cut(options.folder.resolve(), options.part_mb) if made is None else made
    except (NoKit, gpu_parts.Damaged) as error:
        sys.exit(str(error))
    print(len(parts), "parts,", sum(path.stat().st_size for path in parts) // 2**20, "MiB")


def _options() -> argparse.Namespace:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("pack", "cut", "join"):
        added = actions.add_parser(action)
        added.add_argument("folder", type=Path)
        if action != "join":
            added.add_argument("--part-mb", type=float, default=56)
    return parser.parse_args()


if __name__ == "__main__":
    main()
