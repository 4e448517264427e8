"""The state of a Jetson's GPU, which NVML does not tell: clocks from devfreq, heat from its zone, the board's power mode."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from rdeploy.hardware import ROOT
from rdeploy.nvml import GpuState

_GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gb10b")
"""How the GPU's clock is called in /sys/class/devfreq, by board: Orin, Xavier, TX2, Thor."""


class Gpu:
    """Answers like `nvml.Gpu`, with what the kernel tells. Its memory is the host's, its power the board's."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def state(self) -> GpuState:
        """Return clocks and temperature now."""
        clock = next((f for f in sorted((self._root / "sys/class/devfreq").glob("*")) if _GPU.search(f.name)), None)
        zones = (self._root / "sys/class/thermal").glob("thermal_zone*")
        hot = [_number(zone / "temp") for zone in zones if "gpu" in _text(zone / "type").lower()]
        known = [value for value in hot if value is not None]
        return GpuState(
            sm_clock_mhz=None if clock is None else _mega(clock / "cur_freq"),
            sm_clock_max_mhz=None if clock is None else _mega(clock / "max_freq"),
            temperature_c=round(max(known) / 1000) if known else None,
        )

    def energy_j(self) -> None:
        return None

    def power_w(self) -> None:
        return None

    def used_by_bytes(self, pid: int) -> None:
        return None


def power_mode(root: Path = ROOT) -> str | None:
    """Return the board's power mode (nvpmodel) as it is stored, such as `pmode:0000`, or None."""
    return _text(root / "var/lib/nvpmodel/status").split("\n")[0] or None


def _mega(file: Path) -> int | None:
    value = _number(file)
    return None if value is None else value // 1_000_000


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.lstrip("-").isdigit() else None


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace").strip()
    return ""
