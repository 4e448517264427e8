"""The machine that the GPU check runs on: its GPU, the wheels and graphs that were brought, and a TensorRT 8.6.0 that starts."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_kit
import gpu_parts
import gpu_wheels

from rdeploy import hardware

ROOT = Path(__file__).resolve().parent.parent
NO_KIT = (
    "no TensorRT 8.6.0: `make gpu-check ARGS=--fetch-kit` installs it where pip and a Python 3.10 are, "
    "`--wheels FOLDER` takes one that `gpu_kit.py pack` made elsewhere"
)
_NEEDED = (
    "import numpy, tensorrt; from cuda.bindings import runtime; "
    "from rdeploy import backends, machine, memory; backends.find('tensorrt')"
)
"""What a row imports in the kit's Python."""


@dataclasses.dataclass(frozen=True)
class Host:
    """This machine: its GPU, the kit's Python or why there is none, and where graphs and results go."""

    gpu: hardware.Gpu | None
    kit: Path | None
    work: Path
    paths: tuple[str, ...] = ()
    """Where the wheels that were brought are unpacked."""
    brought: Path | None = None
    """The folder that was brought, with graphs in `graphs`."""
    no_kit: str = NO_KIT

    @property
    def name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu.name if self.gpu else "no gpu").lower()).strip("-")


def find(work: Path, *, brought: Path | None, fetch_kit: bool) -> Host:
    """Look at this machine, and make what was brought importable; what is wrong with it is told and ends nothing."""
    gpus = hardware.gpus()
    host = Host(gpu=gpus[0] if gpus else None, kit=None, work=work)
    if brought is not None:
        host = dataclasses.replace(host, paths=_wheels(brought, work / "wheels"), brought=brought)
    if brought is None and not fetch_kit:
        return host
    try:
        kit = _kit(work / "tensorrt-8.6.0", brought, environ(host, ()))
    except (gpu_kit.NoKit, gpu_parts.Damaged, OSError) as error:
        return dataclasses.replace(host, no_kit=str(error))
    return dataclasses.replace(host, kit=kit)


def _wheels(brought: Path, place: Path) -> tuple[str, ...]:
    """Unpack the wheels that fit this Python; TensorRT 8.6.0 has a process of its own."""
    version = sys.version_info[0], sys.version_info[1]
    wheels = [wheel for wheel in gpu_parts.names(brought, ".whl") if not wheel.startswith(gpu_kit.WHEEL)]
    for problem in gpu_wheels.site(brought, [one for one in wheels if gpu_wheels.fits(one, version)], place):
        print(f"not used: {problem}", flush=True)
    sys.path.insert(0, str(place))
    return (str(place),)


def _kit(place: Path, brought: Path | None, environment: dict[str, str]) -> Path:
    """Return the `trt-python` of a TensorRT 8.6.0 that was brought, or else is fetched, and that starts.

    Raises:
        gpu_kit.NoKit, gpu_parts.Damaged, OSError: there is none.
    """
    kit = gpu_kit.fetch(place) if brought is None else gpu_kit.brought(brought, place)
    done = subprocess.run([kit, "-c", _NEEDED], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"code {done.returncode} and no word"])[-1]
        raise gpu_kit.NoKit(f"the Python for TensorRT 8.6.0 does not start: {said[:300]}")
    return kit


def environ(host: Host, wheels: tuple[str, ...]) -> dict[str, str]:
    """Return the environment of a script of this folder: what it imports, and where rdeploy keeps what it keeps."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *wheels])
    return {**os.environ, "PYTHONPATH": paths, "RDEPLOY_CACHE": str(host.work)}
