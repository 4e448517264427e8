"""A folder of wheels, whole or in parts, becomes one importable folder for a Python of a given version."""

from __future__ import annotations

import platform
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import gpu_parts

Version = tuple[int, int]


def fits(wheel: str, version: Version) -> bool:
    """Whether a wheel, by its name, is for CPython of this version on this machine."""
    interpreters, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    if platforms != "any" and not ("linux" in platforms and platforms.endswith(platform.machine())):
        return False
    for interpreter in interpreters.split("."):
        kind, number = interpreter[:2], interpreter[3:]
        if interpreter == f"cp{version[0]}{version[1]}" or interpreter == f"py{version[0]}":
            return True
        if kind == "cp" and "abi3" in abi.split(".") and number.isdigit() and int(number) <= version[1]:
            return True
    return False


def site(folder: Path, wheels: Sequence[str], place: Path) -> list[str]:
    """Unpack wheels into `place`, all into one folder as pip does: some look for others beside them; return what was wrong.

    It is done once: again where the wheels are others, or where one could not be unpacked.
    """
    done, wanted = place / ".wheels", "\n".join(wheels)
    if done.is_file() and done.read_text() == wanted:
        return []
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    problems = []
    for wheel in wheels:
        try:
            with zipfile.ZipFile(gpu_parts.whole(folder, wheel, place.parent / "joined")) as archive:
                archive.extractall(place)
        except (gpu_parts.Damaged, OSError, zipfile.BadZipFile) as error:
            problems.append(f"{wheel}: {error}")
    if not problems:
        done.write_text(wanted)
    return problems
