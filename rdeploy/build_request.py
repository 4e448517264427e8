"""What `rdeploy build` is asked for: the model and how to load it, the variants, the images, the target."""

from __future__ import annotations

from dataclasses import dataclass, field

from rdeploy.adapted import FinetuneOptions
from rdeploy.types import VOID, Options, Size


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
    adapt: str = "auto"
    finetune: FinetuneOptions | None = None
    target: str = "cpu"
    backends: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    out: str = "."
    seed: int = 0
    load: LoadOptions = field(default_factory=LoadOptions)
    command: str = ""
