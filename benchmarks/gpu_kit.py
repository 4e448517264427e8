"""Bring wheels, or TensorRT 8.6.0 with its Python, to a GPU host without package access: in parts, each under a limit.

    python3.10 benchmarks/gpu_kit.py pack OUT [--part-mb 56]     where packages can be had; run it with the Python to travel
    python benchmarks/gpu_kit.py join FOLDER                     on the host: check, join, unpack, stub, write trt-python

TensorRT 8.6.0 is the only whole TensorRT, builder included, that PyPI carries; it needs Python 3.6 to 3.10 and knows GPUs up
to Hopper. Its plugin library links cuBLAS 12 and cuDNN 8 by name; the builder does not need them with those tactic sources
off, so stubs of these names satisfy the import. A stub that is called prints its name and aborts: none is used silently.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME, SUMS, RUNNER = "kit.tar.xz", "SHA256SUMS", "trt-python"
PACKAGES = (
    "tensorrt==8.6.0", "numpy<2.3", "cuda-bindings==12.9.*", "cuda-pathfinder", "platformdirs", "PyYAML", "psutil", "click",
)  # fmt: skip
_LEFT_OUT = ("__pycache__", "test", "tests", "idlelib", "tkinter", "site-packages", "ensurepip", "lib2to3")
_BROUGHT_ALONG = ("libffi", "libz.", "libbz2", "liblzma", "libcrypto", "libssl", "libuuid")
"""Libraries of the system that the standard library links and that another system may have in another version, or not."""
_RUNNER = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONHOME=$here/kit/python PYTHONPATH=$here/kit/site:$PYTHONPATH
export LD_LIBRARY_PATH=$here/kit/site/tensorrt:$here/kit/python/lib:$LD_LIBRARY_PATH
exec "$here/kit/python/bin/python3.10" "$@"
"""


class Parts(io.RawIOBase):
    """A write-only stream that is cut into numbered files of at most `size` bytes."""

    def __init__(self, base: Path, size: int) -> None:
        self.base, self.size, self.paths = base, size, []
        self._left, self._file = 0, None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        total = len(view)
        while view:
            if not self._left:
                self._next()
            count = min(self._left, len(view))
            self._file.write(view[:count])
            self._left -= count
            view = view[count:]
        return total

    def _next(self) -> None:
        if self._file is not None:
            self._file.close()
        self.paths.append(self.base.with_name(f"{self.base.name}.{len(self.paths):03d}"))
        self._file, self._left = self.paths[-1].open("wb"), self.size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


class Joined(io.RawIOBase):
    """The parts in order, as one read-only stream."""

    def __init__(self, paths: list[Path]) -> None:
        self._pieces = self._read(paths)
        self._rest = b""

    @staticmethod
    def _read(paths: list[Path]) -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    yield piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._pieces, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def pack_folder(folder: Path, out: Path, part_mb: float) -> list[Path]:
    """Write `folder` as `kit` into numbered parts with their checksums; return the parts."""
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out / NAME, int(part_mb * 2**20))
    with lzma.open(parts, "wb", preset=2) as compressed, tarfile.open(fileobj=compressed, mode="w|") as archive:
        archive.add(folder, "kit")
    parts.close()
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in parts.paths]
    (out / SUMS).write_text("".join(lines))
    return parts.paths


def pack(out: Path, part_mb: float) -> list[Path]:
    """Pack TensorRT 8.6.0, what rdeploy needs beside it, and the Python that runs this."""
    if sys.version_info[:2] != (3, 10):
        sys.exit("run this with Python 3.10: TensorRT 8.6.0 has wheels for 3.6 to 3.10 only")
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        kit = Path(work) / "kit"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--only-binary=:all:"]
        subprocess.run([*pip, "--target", kit / "site", *PACKAGES], check=True)
        copy_python(Path(sys.base_prefix), kit / "python")
        return pack_folder(kit, out, part_mb)


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


def join(folder: Path) -> Path:
    """Check and unpack the parts in `folder`; return the `trt-python` to run scripts with.

    Raises:
        SystemExit: a part is missing or damaged.
    """
    runner = folder / RUNNER
    if runner.is_file() and (folder / "kit").is_dir():
        return runner
    lines = [line.split() for line in (folder / SUMS).read_text().splitlines()]
    for digest, name in lines:
        part = folder / name
        if not part.is_file() or hashlib.sha256(part.read_bytes()).hexdigest() != digest:
            sys.exit(f"{part} is missing or damaged: bring it again")
    with (
        lzma.open(io.BufferedReader(Joined([folder / name for _, name in lines])), "rb") as content,
        tarfile.open(fileobj=content, mode="r|") as archive,
    ):
        # The checksums are ours, and the links of a Python are many; Pythons before 3.10.12 know no filter and need none.
        archive.extractall(folder, **({"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}))
    if (plugin := folder / "kit" / "site" / "tensorrt" / "libnvinfer_plugin.so.8").is_file():
        write_stubs(plugin)
    runner.write_text(_RUNNER)
    runner.chmod(0o755)
    return runner


def unpacked(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel once, and return the folder that makes it importable."""
    place = folder / wheel.stem
    if not place.is_dir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    return place


def write_stubs(plugin: Path) -> dict[str, int]:
    """Compile a stub for every cuBLAS and cuDNN library that is not there; return how many functions each has."""
    wanted: dict[str, set[str]] = collections.defaultdict(set)
    listed = subprocess.run(["nm", "-D", "--undefined-only", plugin], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        symbol, _, library = line.split()[-1].replace("@@", "@").partition("@")
        if library.startswith(("libcublas", "libcudnn")):
            wanted[library].add(symbol)
    for library, symbols in wanted.items():
        functions = [f'void {s}(void) {{ fputs("stub called: {s}\\n", stderr); abort(); }}\n' for s in sorted(symbols)]
        script = plugin.with_name(f"{library}.map")
        script.write_text(f"{library} {{ global: *; }};\n")
        linked = [f"-Wl,-soname,{library}", f"-Wl,--version-script={script}", "-o", str(plugin.with_name(library))]
        source = "#include <stdio.h>\n#include <stdlib.h>\n" + "".join(functions)
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", *linked]
        subprocess.run(command, input=source, text=True, check=True)
        script.unlink()
    return {library: len(symbols) for library, symbols in wanted.items()}


def main() -> None:
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawTextHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser("pack")
    packing.add_argument("out", type=Path)
    packing.add_argument("--part-mb", type=float, default=56)
    actions.add_parser("join").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.action == "pack":
        parts = pack(options.out.resolve(), options.part_mb)
        print(len(parts), "parts,", sum(path.stat().st_size for path in parts) // 2**20, "MiB")
    else:
        print(join(options.folder.resolve()))


if __name__ == "__main__":
    main()
