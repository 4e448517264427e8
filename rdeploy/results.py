"""What a build finds out: verdicts, costs, how the precisions were made, a row for each variant. JSON-able like `types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rdeploy.adapted import Adaptation, Usability
from rdeploy.measured import Measurement
from rdeploy.types import Engine, ModelSpec, Target, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """An engine against the same variant in FP32, over `samples` images: what quantize + build cost."""

    max_abs_err: float
    cosine: float
    sqnr_db: float
    top1_agreement: float | None
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The whole variant against the labels (`labelled`) or against the native model's decisions; fractions in 0..1.

    `ci95` is the interval of `value`; `drop_ci95` that of `drop`, where it was found by resampling both on the same images.
    """

    metric: str
    value: float
    reference: float
    drop: float
    ci95: tuple[float, float]
    samples: int
    labelled: bool
    drop_ci95: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The verdict on one engine. `executed_by` names the runtime whose outputs were compared."""

    passed: bool
    reasons: tuple[str, ...] = ()
    executed_by: str = ""
    parity: Parity | None = None
    accuracy: Accuracy | None = None
    agreement: Accuracy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A variant against the native FP32 baseline on the same backend, from paired, interleaved runs."""

    backend: str
    speedup: float
    speedup_ci95: tuple[float, float]
    memory_ratio: float | None
    size_ratio: float | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a variant or an engine is not there, and how to see it again."""

    stage: str
    error: str
    message: str
    reproduce: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """One engine with what was found out about it; `engine` is None where building failed."""

    backend: str
    engine: Engine | None = None
    verification: Verification | None = None
    measurement: Measurement | None = None
    comparison: Comparison | None = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Analytic cost of a graph at batch 1: multiply-accumulates, parameters, weight and peak live activation bytes."""

    macs: int
    params: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """What mixed precision costs with so many layers in float: points lost on the images, their share of the MACs, latency.

    `latency_ms` is modelled: linear in the share of the MACs, between two engines that were measured.
    """

    layers: int
    drop: float
    float_macs: float
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallbacks:
    """How the layers that stay in float were found: within `max_drop` points, judged on `samples` images.

    `layers` holds their names with their share of the INT8 graph's error, the worst first; `candidates` is how many
    were ranked, `evaluations` how many graphs were judged.
    """

    max_drop: float
    layers: tuple[tuple[str, float], ...]
    candidates: int
    evaluations: int
    curve: tuple[CurvePoint, ...]
    samples: int
    labelled: bool
    latency_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What the INT8 ranges were found with."""

    calibrator: str
    samples: int
    images_sha256: str
    skipped: tuple[tuple[str, str], ...] = ()
    """Layers left in float and why."""
    recipe: tuple[str, ...] = ()
    coverage: float = 1.0
    """Share of the MACs that carry Q/DQ."""
    fallbacks: Fallbacks | None = None
    """What accuracy control did; None where it was not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Float16:
    """What was written in FP16: of how many layers, those kept in FP32 with the reason, the casts between the two.

    `denormals` of the `weights` that were rounded are below FP16's smallest normal number. Overflow was looked for on
    `samples` images.
    """

    layers: int
    kept: tuple[tuple[str, str], ...]
    casts: int
    weights: int
    denormals: int
    samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One variant's row: status is "ok", "unsupported" or "failed"."""

    variant: Variant
    target: str
    status: str
    engines: tuple[EngineResult, ...] = ()
    cost: Cost | None = None
    quantization: Quantization | None = None
    fp16: Float16 | None = None
    adaptation: Adaptation | None = None
    usability: Usability | None = None
    bundle: str | None = None
    failure: Failure | None = None
    reproduce: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Which precision to deploy at one place, and the two numbers that say so; None where nothing was measured.

    `speedup` and `drop` (points, against FP32 at this resolution) are those of the quantized engine that was accepted or
    refused, against the best engine in `against`, a floating-point precision.
    """

    place: str
    """The variants' name without their precision: `r168`."""
    precision: str | None
    reason: str
    backend: str = ""
    against: str | None = None
    speedup: float | None = None
    drop: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """The native FP32 baseline and the variants, with what was found out on the way."""

    spec: ModelSpec
    target: Target
    baseline: Result
    variants: tuple[Result, ...]
    environment: tuple[tuple[str, Any], ...] = ()
    timings_s: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
