"""The words of a search: points, candidates, what was measured of them, the budget; the sizes to try, and the Pareto front.

Pure: no file, no clock, no model. A *drop* is in percentage points of the task's metric, against the native model, with its
95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rdeploy import pareto
from rdeploy.types import Size, Variant, engine_name

Way = tuple[str, int]
"""A backend, and how many images it takes at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to deploy: a variant on a backend, so many images at a time."""

    variant: Variant
    backend: str
    batch: int = 1

    @property
    def id(self) -> str:
        """`r168-int8@openvino`, with `-batch8` where it takes more than one image at a time."""
        return f"{self.variant.id}@{engine_name(self.backend, self.batch)}"

    @property
    def way(self) -> Way:
        """How it runs, whatever the variant is."""
        return self.backend, self.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is known of a variant before an engine is measured: its cost, and what its FP32 form lost on `images` images so far.

    `changed` is how many decisions in a hundred are not the native model's, where `drop` is of labels, `samples` of them.
    """

    variant: Variant
    macs: int
    drop: Interval
    images: int
    changed: Interval | None = None
    samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured of a point; the latency is that of one run, which takes the point's whole batch.

    `unfit` holds why the machine was not fit for it while it was measured; empty means fit. `changed` is how many decisions in
    a hundred are not the native model's, where `drop` is of labels, `samples` of them.
    """

    point: Point
    macs: int
    drop: Interval
    latency_ms: Interval
    throughput_ips: float
    memory_bytes: int | None
    size_bytes: int
    unfit: tuple[str, ...] = ()
    changed: Interval | None = None
    samples: int = 0

    @property
    def variant(self) -> Variant:
        """The point's variant."""
        return self.point.variant

    @property
    def ms_per_image(self) -> float:
        """The latency's share of one image of the batch."""
        return self.latency_ms.value / self.point.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the user can afford; None where nothing was said. Memory is the process's peak, size the engine's files."""

    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    max_size_mb: float | None = None
    objective: str = "latency"

    @property
    def limits_only_the_drop(self) -> bool:
        """Whether any latency, memory and size will do."""
        return self.max_latency_ms is self.max_memory_mb is self.max_size_mb is None


def resolutions(native: tuple[int, int], *, step: int = 32, least: float = 0.4) -> tuple[tuple[int, int], ...]:
    """Return the input sizes worth a look: the native one and those below it, `step` pixels of the shorter side apart.

    At least six steps are taken: a small native size gets a finer grid (in multiples of 4 pixels).
    """
    short = min(native)
    stride = min(step, max(4, round(short * (1 - least) / 6 / 4) * 4))
    sides = range(short, math.ceil(short * least) - 1, -stride)
    return tuple((round(native[0] * side / short), round(native[1] * side / short)) for side in sides)


def downwards(variants: Iterable[Variant]) -> list[Variant]:
    """Return variants place by place, each from its largest size down."""

    return sorted(variants, key=lambda one: (one.at, -math.prod(height * width for height, width in _sizes(one))))


def enlarges(variant: Variant, native: Size) -> bool:
    """Whether a variant is larger than the native model somewhere."""
    return any(height > native[0] or width > native[1] for height, width in _sizes(variant))


def _sizes(variant: Variant) -> list[Size]:
    return [variant.resolution, *(dict(options)["resolution"] for _, options in variant.resize_options)]


def front(measured: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """Return the Pareto front of drop against latency per image, fastest first; within 3 % of each other they count as equal."""
    return pareto.front(measured, cost=lambda one: one.ms_per_image, loss=lambda one: one.drop.value)


def points_text(drop: Interval) -> str:
    """Return `2.0 points [1.5, 2.5]`."""
    return f"{drop.value:.1f} points [{drop.low:.1f}, {drop.high:.1f}]"
