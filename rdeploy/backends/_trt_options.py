"""What a profile may ask of a TensorRT builder: frozen options go in, a configured `IBuilderConfig` comes out.

Nothing is set that was not asked for, and what a version does not have is refused with the version that has it. The API of
every version was recorded from the vendor's own packages (`tests/backends/surfaces`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import store
from rdeploy.backends import _engine
from rdeploy.errors import ConfigError, Unsupported
from rdeploy.types import TensorInfo

BatchRange = tuple[int, int, int]
"""The smallest, the tuned-for and the largest batch of one optimization profile."""

_SINCE = {
    "optimization_level": "8.6",
    "version_compatible": "8.6",
    "hardware_compatibility": "8.6",
    "strip_weights": "10.0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What both TensorRTs can be asked for. None leaves the vendor's default.

    workspace_mb: scratch memory that a kernel may use; None is all of the device's.
    optimization_level: how hard to search, 0 to 5 (TensorRT's default is 3).
    sparse_weights: allow kernels for 2:4 sparse weights; the engine's notes say whether any was chosen.
    refit, strip_weights: weights can be replaced later; with the latter the engine holds none of those that are in the ONNX.
    version_compatible: later versions of the same major release can load it, with the lean runtime library of the version
        that built it; with `lean_runtime` the engine brings that, which is code: opening others' needs the user's consent.
    batch_ranges: one optimization profile each; empty takes the target's batch sizes, as one range, or with
        `profile_per_batch` as one range for each size, tuned for it.
    """

    workspace_mb: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    sparse_weights: bool = False
    refit: bool = False
    strip_weights: bool = False
    version_compatible: bool = False
    lean_runtime: bool = False
    profile_per_batch: bool = False
    batch_ranges: tuple[tuple[int, ...], ...] = ()


def configure(title: str, trt: Any, config: Any, options: BuildOptions) -> None:
    """Set the options that both TensorRTs have.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
        Unsupported: this version lacks what was asked for.
    """
    if options.lean_runtime and not options.version_compatible:
        raise ConfigError("lean_runtime needs version_compatible: it is what other versions run the engine with")
    if options.workspace_mb is not None:
        _at_least(options.workspace_mb, 1, "workspace_mb")
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.optimization_level is not None:
        if not 0 <= options.optimization_level <= 5:
            raise ConfigError(f"optimization_level must be 0 to 5, not {options.optimization_level}")
        need(hasattr(config, "builder_optimization_level"), title, trt, "optimization_level")
        config.builder_optimization_level = options.optimization_level
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    for flag, option in _wanted_flags(options):
        need(hasattr(trt.BuilderFlag, flag), title, trt, option)
        config.set_flag(getattr(trt.BuilderFlag, flag))


def fingerprint(options: BuildOptions) -> tuple[tuple[str, bool], ...]:
    """Return what of the options decides which other versions open the engine."""
    return (("version_compatible", options.version_compatible), ("lean_runtime", options.lean_runtime))


def _wanted_flags(options: BuildOptions) -> Iterator[tuple[str, str]]:
    if options.sparse_weights:
        yield "SPARSE_WEIGHTS", "sparse_weights"
    if options.refit:
        yield "REFIT", "refit"
    if options.strip_weights:
        yield "STRIP_PLAN", "strip_weights"
    if options.version_compatible:
        yield "VERSION_COMPATIBLE", "version_compatible"
        if not options.lean_runtime:
            yield "EXCLUDE_LEAN_RUNTIME", "version_compatible"


def need(there: bool, title: str, trt: Any, option: str) -> None:
    """Refuse an option that this version does not have.

    Raises:
        Unsupported: it is not there.
    """
    if not there:
        since = f", it came with {_SINCE[option]}" if option in _SINCE else ""
        raise Unsupported(f"{title} {trt.__version__} has no {option}{since}: leave it out of the profile")


def batch_ranges(options: BuildOptions, batch_sizes: Sequence[int]) -> tuple[BatchRange, ...]:
    """Return the ranges of a dynamic batch, one optimization profile each.

    Raises:
        ConfigError: a range is not smallest <= tuned for <= largest, or a batch size of the target is in none.
    """
    if not options.batch_ranges:
        if not options.profile_per_batch:
            return ((min(batch_sizes), batch_sizes[0], max(batch_sizes)),)
        ordered = sorted(set(batch_sizes))
        return tuple((low + 1, size, size) for low, size in zip([ordered[0] - 1, *ordered], ordered))
    found: list[BatchRange] = []
    for given in options.batch_ranges:
        if len(given) != 3 or not 1 <= given[0] <= given[1] <= given[2]:
            raise ConfigError(f"batch_ranges are [smallest, tuned for, largest], not {list(given)}")
        found.append((given[0], given[1], given[2]))
    for size in batch_sizes:
        if not any(low <= size <= high for low, _, high in found):
            raise ConfigError(f"batch {size} of the target is in none of the batch_ranges {[list(r) for r in found]}")
    return tuple(found)


def add_optimization_profiles(
    builder: Any, config: Any, inputs: Sequence[TensorInfo], ranges: Sequence[BatchRange]
) -> None:
    """Let a dynamic batch take each of `ranges`; a graph without a dynamic batch needs none.

    Raises:
        Unsupported: another dimension is dynamic.
    """
    _engine.check_only_batch_is_dynamic(inputs)
    dynamic = [info for info in inputs if -1 in info.shape]
    for batches in ranges if dynamic else ():
        profile = builder.create_optimization_profile()
        for info in dynamic:
            profile.set_shape(info.name, *((batch, *info.shape[1:]) for batch in batches))
        config.add_optimization_profile(profile)


def timing_cache_path(name: str, version: str, device: str) -> Path:
    """Return where the measured times of kernels are kept: they hold for one version on one kind of GPU."""
    kind = re.sub(r"[^a-z0-9.]+", "-", f"{name}-{version}-{device}".lower())
    return store.default_root() / "timing" / f"{kind}.cache"


@contextlib.contextmanager
def timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Build with the kernel times measured by earlier builds, and keep those of this one beside them.

    A cache that this TensorRT refuses (another version, a damaged file) is begun anew. Two builds at once both keep theirs:
    each merges what the other wrote meanwhile.
    """
    if path is None:
        yield
        return
    known = path.read_bytes() if path.is_file() else b""
    if not _set_cache(config, known):
        _set_cache(config, b"")
    yield
    measured = config.get_timing_cache()
    if measured is None:
        return
    meanwhile = path.read_bytes() if path.is_file() else b""
    if meanwhile and meanwhile != known and (other := config.create_timing_cache(meanwhile)) is not None:
        measured.combine(other, True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}-{id(measured):x}")
    partial.write_bytes(bytes(measured.serialize()))
    partial.replace(path)


def _set_cache(config: Any, content: bytes) -> bool:
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def _at_least(value: int, least: int, option: str) -> None:
    if value < least:
        raise ConfigError(f"{option} must be {least} or more, not {value}")
