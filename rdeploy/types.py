"""The frozen dataclasses that move between the stages: small facts and paths, never tensors; all JSON-able.

Sizes are (height, width) in pixels. Units are suffixes: `_ms`, `_s`, `_bytes`, `_db`. What is asked for is in
`build_request`, what was found out in `measured` and `results`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Size = tuple[int, int]
Options = tuple[tuple[str, Any], ...]
"""Key/value pairs, hashable and ordered: how plugin options travel inside a frozen dataclass."""
PRECISIONS = ("fp32", "fp16", "int8")
REPORTS = ("html", "markdown", "csv", "svg", "png")
"""What the report of a run may be written as."""
OBJECTIVES = ("latency", "throughput", "memory", "size")
"""What a search may look for."""
RECIPES = (
    "auto",
    "plain",
    "depthwise",
    "dense",
    "vit",
    "windowed",
    "hybrid",
    "scores",
    "attention",
    "fast",
    "thorough",
)
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


def engine_name(backend: str, batch: int) -> str:
    """Return `openvino`, or `openvino-batch8` where it takes more than one image at a time."""
    return backend if batch == 1 else f"{backend}-batch{batch}"


def format_size(size: Size) -> str:
    """Return `168` for a square size and `168x224` (height x width) otherwise."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image becomes the network's input: resize the shorter side, centre-crop, scale to 0..1, normalise.

    `mean` and `std` are in units of 0..1. `crop_pct` is the fraction of the resized side that the crop keeps; with
    `crop_mode` "squash" both sides are resized apart, so that the whole image is seen where `crop_pct` is 1. Without
    `antialias` a bilinear filter looks at two pixels along each axis only, as OpenCV's and PyTorch's own do.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    antialias: bool = True


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
    preprocessing: Preprocessing | None = None
    """What suits this resolution better than the model's own; None where that stays."""
    weights: str = ""
    """The sha256 that names adapted weights; empty where they are the model's own."""
    sample: str = ""
    """Tells variants apart that differ in nothing else that their name says; a sampler gives it."""

    @property
    def id(self) -> str:
        """`r168-int8`, `r168x224-fp32`, `r224-stem168-int8`: the bundle's suffix and the row's name."""
        inside = [
            f"-{at.replace(':', '-').replace('/', '-')}{'-' if ':' in at else ''}{format_size(dict(options)['resolution'])}"
            for at, options in self.resize_options
        ]
        sample = f"-{self.sample}" if self.sample else ""
        return f"r{format_size(self.resolution)}{''.join(inside)}{sample}-{self.precision}"

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
    what the smallest GPU of its kind has, on a Jetson what CPU and GPU share.
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
    `joined_tokens`: whether a layer may read a Concat of token sequences in integers. `products`: which of attention's products
    are quantized: "none", "scores" (those that read nothing that a softmax puts out) or "all"; `patches`: whether the patch
    embedding is; a recipe asks for either. `integer_attention`: whether the runtime is faster with the scores and the
    patch embedding in integers: that is tried where no recipe asks. It multiplies integers without a zero point there.
    `activation_bits`: fewer than 8 are simulated, by a Clip in front of an 8-bit Q/DQ pair: no runtime executes them as such.
    """

    name: str
    activations: str
    ops: tuple[str, ...]
    output_ops: tuple[str, ...] = ()
    residual: str = "all"
    weight_max: int = 127
    joined_tokens: bool = True
    products: str = "none"
    patches: bool = False
    integer_attention: bool = False
    activation_bits: int = 8


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
