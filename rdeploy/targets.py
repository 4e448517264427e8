"""Deployment targets: the name of a profile, or a YAML file, goes in; a checked `Target` comes out."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdeploy import hardware, plugins, strict_yaml
from rdeploy.errors import ConfigError
from rdeploy.types import PRECISIONS, Limits, Options, Target, Timing

log = logging.getLogger(__name__)

_OPSETS = range(17, 21)  # 17 brought LayerNormalization; static INT8 above 20 has known problems in ONNX Runtime.
_SECTIONS = {"timing": Timing, "limits": Limits}

_BY_NAME = (
    (r"\bA100\b", "a100"),
    (r"\bH100\b", "h100"),
    (r"\bG?H200\b", "h200"),
    (r"\bL4\b", "l4"),
    (r"\bT4\b", "t4"),
    (r"\bRTX 30\d\d\b", "rtx-30"),
    (r"\bRTX 40\d\d\b", "rtx-40"),
    (r"\bRTX 50\d\d\b", "rtx-50"),
)
_BY_CAPABILITY = {
    "sm_75": "t4", "sm_80": "a100", "sm_86": "rtx-30", "sm_89": "rtx-40", "sm_90": "h200", "sm_120": "rtx-50",
}  # fmt: skip
_BOARDS = (
    (r"Xavier|Jetson-AGX$", None, "jetson-xavier-jp5"),
    (r"Thor", None, "jetson-thor"),
    (r"Orin", 5, "jetson-orin-jp5"),
    (r"AGX Orin", 7, "jetson-agx-orin-jp7"),
    (r"Orin", 7, "jetson-orin-nano-jp7"),
    (r"AGX Orin", None, "jetson-agx-orin-jp6"),
    (r"Orin", None, "jetson-orin-nano-jp6"),
)
"""What a Jetson's device tree says, the JetPack that must be there (None: any), the profile; the first that fits."""
_RENAMED = {"jetson-orin-jp6": "jetson-agx-orin-jp6"}


def names() -> tuple[str, ...]:
    """Return the names of the profiles that come with rdeploy, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def load(name_or_path: str) -> Target:
    """Return the target of a profile's name, of a YAML file's path, or of this machine (`auto`).

    Raises:
        ConfigError: there is no such profile or file, or the file says something that a target cannot be.
    """
    name = auto() if name_or_path == "auto" else _RENAMED.get(name_or_path, name_or_path)
    if name in names():
        return _parse(_folder() / f"{name}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _parse(path)
    hint = plugins.did_you_mean(name, names())
    raise ConfigError(
        f"unknown target {name!r}{hint}; there are: {', '.join(names())}, auto, or the path of a YAML file"
    )


def auto() -> str:
    """Return the name of the profile that fits this machine: its Jetson board, its GPU, else `cpu`."""
    if (board := hardware.jetson_model()) is not None:
        jetpack = hardware.jetpack()
        fits = (name for pattern, major, name in _BOARDS if re.search(pattern, board) and major in (None, jetpack))
        return next(fits, None) or _without_a_profile(board)
    for gpu in hardware.gpus():
        profile = _named(gpu.name) or _BY_CAPABILITY.get(gpu.compute_capability)
        if profile is not None:
            return profile
    return _without_a_profile(", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in hardware.gpus()))


def _without_a_profile(device: str) -> str:
    """Return the profile of any machine, and say so where there is a device that it leaves idle."""
    if device:
        log.warning(
            "no profile fits %s: taking cpu; write one of your own and name it with --target (docs/targets.md)", device
        )
    return "cpu"


def _named(device: str) -> str | None:
    return next((profile for pattern, profile in _BY_NAME if re.search(pattern, device)), None)


def _folder() -> Path:
    """Return where the profiles are: inside the package in a wheel, beside it in a clone."""
    inside = Path(__file__).parent / "profiles"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "profiles"


def _parse(path: Path) -> Target:
    data = strict_yaml.read(path, what="target profile")
    values: dict[str, Any] = {"name": path.stem}
    backend_options: tuple[tuple[str, Options], ...] = ()
    for key, value in data.items():
        where = f"{path}: {key}"
        if key in _SECTIONS:
            values[key] = plugins.make_options(_SECTIONS[key], strict_yaml.mapping(value, where=where), where=where)
        elif key == "backend_options":
            backend_options = _backend_options(strict_yaml.mapping(value, where=where), where=where)
        else:
            values[key] = _frozen(value)
    target: Target = plugins.make_options(Target, values, where=str(path))
    target = dataclasses.replace(target, backend_options=backend_options)
    _check(target, str(path))
    return target


def _backend_options(data: Mapping[str, Any], *, where: str) -> tuple[tuple[str, Options], ...]:
    return tuple(
        (backend, tuple((k, _frozen(v)) for k, v in strict_yaml.mapping(options, where=f"{where}.{backend}").items()))
        for backend, options in data.items()
    )


def _frozen(value: Any) -> Any:
    """Return lists as tuples, all the way down: a target is hashable."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _check(target: Target, where: str) -> None:
    """Refuse values of the right type that no target can have."""
    known = plugins.names("rdeploy.backends")
    for backend in (*target.backends, *dict(target.backend_options)):
        if backend not in known:
            hint = plugins.did_you_mean(backend, known)
            raise ConfigError(f"{where}: unknown backend {backend!r}{hint}; there are: {', '.join(known)}")
    for backend, given in target.backend_options:
        place = f"{where}: backend_options.{backend}"
        plugins.make_options(plugins.find("rdeploy.backends", backend).Options, dict(given), where=place)
    for precision in target.precisions:
        if precision not in PRECISIONS:
            hint = plugins.did_you_mean(precision, PRECISIONS)
            raise ConfigError(f"{where}: unknown precision {precision!r}{hint}; there are: {', '.join(PRECISIONS)}")
    for capability in target.compute_capabilities:
        if not re.fullmatch(r"sm_\d{2,3}", capability):
            raise ConfigError(f"{where}: compute_capabilities are written like sm_89, not {capability!r}")
    problems = (
        (not target.backends, "backends must name at least one runtime"),
        (not target.precisions, "precisions must name at least one"),
        (not target.batch_sizes or min(target.batch_sizes, default=0) < 1, "batch_sizes must be 1 or more"),
        (target.int8_rest not in ("fp16", "fp32"), f"int8_rest must be fp16 or fp32, not {target.int8_rest!r}"),
        (target.opset not in _OPSETS, f"opset must be {_OPSETS.start} to {_OPSETS.stop - 1}, not {target.opset}"),
        (target.threads is not None and target.threads < 1, f"threads must be 1 or more, not {target.threads}"),
        (
            re.fullmatch(r"(\d+\.\d+)?", target.tensorrt) is None,
            f"tensorrt is a version like '10.3', not {target.tensorrt!r}",
        ),
        (target.memory_mb is not None and target.memory_mb < 1, f"memory_mb must be 1 or more, not {target.memory_mb}"),
        (target.timing.min_samples < 1, "timing.min_samples must be 1 or more"),
        (target.timing.max_samples < target.timing.min_samples, "timing.max_samples is below min_samples"),
        (target.timing.max_time_s < target.timing.min_time_s, "timing.max_time_s is below min_time_s"),
    )
    for wrong, message in problems:
        if wrong:
            raise ConfigError(f"{where}: {message}")
