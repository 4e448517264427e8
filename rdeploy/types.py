"""The frozen dataclasses that move between the stages: small facts and paths, never tensors; all JSON-able.

Sizes are (height, width) in pixels. Units are suffixes: `_ms`, `_s`, `_bytes`, `_db`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rdeploy.measured import Measurement as Measurement
from rdeploy.measured import Memory as Memory

Size = tuple[int, int]
Options = tuple[tuple[str, Any], ...]
"""Key/value pairs, hashable and ordered: how plugin options travel inside a frozen dataclass."""

PRECISIONS = ("fp32", "fp16", "int8")
OBJECTIVES = ("latency", "throughput", "memory", "size")
"""What a search may look for."""
RECIPES = ("auto", "plain", "depthwise", "dense", "vit", "windowed", "hybrid", "fast", "thorough")
"""What may be tried on a graph when it is quantized (`rdeploy.quantize.families`); "auto" is what suits the graph."""
EXPECTED = "expected: "
"""What a note begins with that is told before anything is built."""
TASKS = ("classification", "segmentation", "detection", "embedding")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
"""Pillow's filters: what `Preprocessing.interpolation` may be."""
CROP_MODES = ("center", "squash")
"""timm's words: keep the proportions and cut the centre out, or squeeze the whole image into the network's input."""
VOID = 255
"""The value of a mask's pixels that are of no class, where nobody declares another."""


def format_size(size: Size) -> str:
    """Return `168` for a square size and `168x224` (height x width) otherwise."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input: resize the shorter side, centre-crop, scale to 0..1, normalise.

    `mean` and `std` are in units of 0..1. `crop_pct` is the fraction of the resized side that the crop keeps; with
    `crop_mode` "squash" both sides are resized apart, so that the whole image is seen where `crop_pct` is 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What is known of a model besides its weights. `assumed` names the fields nobody told us (defaults were taken)."""

    name: str
    source: str
    sha256: str
    native_resolution: Size
    preprocessing: Preprocessing
    task: str = "classification"
    channels: int = 3
    labels: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantOptions:
    """How INT8 is found: the recipe, a calibrator's name and options, and how many images at most."""

    recipe: str = "auto"
    calibrator: str = "auto"
    calibrator_options: Options = ()
    samples: int = 256
    keep_float: tuple[str, ...] = ()
    """Layers that stay in float, by name."""
    max_drop: float | None = None
    """How many points quantization may cost on the images before layers fall back to float; None asks for INT8 alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One point in the space: input resolution x resize methods x precision. Hashable; holds no path.

    `resolution` is the size of the images that the network is given. `at` names the places at which the resolution is
    reduced, joined by `+`; `resize_options` holds, for each place inside the network, the `resolution` of the images that
    would make as much work behind it, and the method's own options.
    """

    resolution: Size
    precision: str = "fp32"
    at: str = "input"
    resize_options: Options = ()
    quant: QuantOptions | None = None
    embeds_preprocessing: bool = False
    """Whether uint8 pictures of the native size go in, and are resized and normalised inside the graph."""

    @property
    def id(self) -> str:
        """`r168-int8`, `r168x224-fp32`, `r224-stem168-int8`: the bundle's suffix and the row's name."""
        inside = [
            f"-{at.replace(':', '-').replace('/', '-')}{'-' if ':' in at else ''}{format_size(dict(options)['resolution'])}"
            for at, options in self.resize_options
        ]
        return f"r{format_size(self.resolution)}{''.join(inside)}-{self.precision}"

    @property
    def place(self) -> str:
        """`r168`, `r224-stem168`: the variant's name without its precision."""
        return self.id.removesuffix(f"-{self.precision}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long to measure: until both floors are met, or a ceiling is hit."""

    min_samples: int = 200
    max_samples: int = 700
    min_time_s: float = 1.0
    max_time_s: float = 8.0
    max_warmup_s: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a variant fails verification: thresholds against the same variant in FP32 (parity)."""

    min_cosine: float = 0.9
    min_sqnr_db: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One `profiles/*.yaml`: what to build for, and how to measure there.

    `backends` are in order of preference; those in `backend_options` carry a plugin's own `Options`.
    `compute_capabilities` ("sm_89") are built ahead of time where the backend can; empty means the GPU that is here.
    `tensorrt` ("10.3") is the version that the device's system brings, empty where any can be installed. `memory_mb` is
    what the GPU has, on a Jetson what CPU and GPU share.
    """

    name: str
    description: str = ""
    backends: tuple[str, ...] = ("onnxruntime", "openvino")
    backend_options: tuple[tuple[str, Options], ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    dynamic_batch: bool = False
    opset: int = 18
    tensorrt: str = ""
    memory_mb: int | None = None
    dla_cores: int = 0
    threads: int | None = None
    precisions: tuple[str, ...] = ("fp32", "int8")
    int8_rest: str = "fp16"
    """What an INT8 graph's float layers are written in, where `precisions` and the runtime have it: fp16 or fp32."""
    timing: Timing = field(default_factory=Timing)
    limits: Limits = field(default_factory=Limits)
    sources: tuple[str, ...] = ()

    def options_of(self, backend: str) -> Options:
        """Return the profile's options for one backend, empty when it has none."""
        return dict(self.backend_options).get(backend, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """What a runtime can execute in INT8; Q/DQ placement and ranges follow it.

    `activations`: "int8" (symmetric, zero point 0) or "uint8" (affine). Weights are always INT8, symmetric, per channel.
    `ops`: op types whose inputs are quantized. `output_ops`: of these, the ones whose output must be quantized as well
    before the runtime takes its INT8 kernel. `residual`: "all" quantizes every input of an Add, "branch" only
    the input that does not come straight from a convolution (TensorRT fuses that one), "none" leaves Add in float.
    `weight_max`: the largest quantized weight; 63 where a kernel's 16-bit accumulation would saturate.
    """

    name: str
    activations: str
    ops: tuple[str, ...]
    output_ops: tuple[str, ...] = ()
    residual: str = "all"
    weight_max: int = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A graph input or output: ONNX name, NumPy dtype name, shape with -1 for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def takes_pixels(self) -> bool:
        """Whether an image input takes uint8 (N, H, W, C) pictures and not normalised (N, C, H, W) images."""
        return self.dtype == "uint8"

    @property
    def image_size(self) -> Size:
        """The (h, w) of an image input."""
        return (self.shape[1], self.shape[2]) if self.takes_pixels else (self.shape[2], self.shape[3])

    @property
    def channels(self) -> int:
        """The channels of an image input."""
        return self.shape[3] if self.takes_pixels else self.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """An ONNX file: the intermediate representation between the stages."""

    path: str
    sha256: str
    precision: str
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a backend built. `device` is where it was built or, with `built_for`, the hardware it was built for."""

    path: str
    sha256: str
    size_bytes: int
    backend: str
    backend_version: str
    source_sha256: str
    build_s: float
    build_peak_bytes: int | None = None
    build_device_peak_bytes: int | None = None
    device: str = ""
    built_for: tuple[str, ...] = ()
    executed_precision: tuple[tuple[str, int], ...] = ()
    """How many layers (or kernels) ran in each precision, as the runtime itself tells: (("int8", 52), ("f32", 3))."""
    notes: tuple[str, ...] = ()
    fingerprint: Options = ()
    """What decides whether it may be opened on another machine: operating system and architecture, CPU features, driver."""


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
    """The whole variant against the labels (`labelled`) or against the native model's decisions; fractions in 0..1."""

    metric: str
    value: float
    reference: float
    drop: float
    ci95: tuple[float, float]
    samples: int
    labelled: bool


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
class Result:
    """One variant's row: status is "ok", "unsupported" or "failed"."""

    variant: Variant
    target: str
    status: str
    engines: tuple[EngineResult, ...] = ()
    cost: Cost | None = None
    quantization: Quantization | None = None
    fp16: Float16 | None = None
    bundle: str | None = None
    failure: Failure | None = None
    reproduce: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to turn MODEL into a network; the fields after `seed` override what the model says of itself."""

    arch: str | None = None
    arch_kwargs: Options = ()
    random_init: bool = False
    trust_pickle: bool = False
    offline: bool = False
    seed: int = 0
    task: str | None = None
    native_resolution: Size | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `rdeploy build` was asked for; `command` is the command line that says the same again."""

    model: str
    scales: tuple[float, ...] = ()
    resolutions: tuple[Size, ...] = ()
    at: tuple[str, ...] = ("input",)
    precisions: tuple[str, ...] = ("fp32",)
    calib: str | None = None
    calib_samples: int = 256
    calibrator: str = "auto"
    recipe: str = "auto"
    max_drop: float | None = None
    data: str | None = None
    void: tuple[int, ...] = (VOID,)
    embed_preprocess: bool = False
    target: str = "cpu"
    backends: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    out: str = "."
    seed: int = 0
    load: LoadOptions = field(default_factory=LoadOptions)
    command: str = ""


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
