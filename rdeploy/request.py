"""What a user asked for, as options, goes in; a checked `BuildRequest` comes out. Loads no model and writes nothing."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rdeploy import backends, plugins, resize, targets
from rdeploy import option_values as values
from rdeploy.adapted import ADAPT, OPTIMIZERS, FinetuneOptions
from rdeploy.build_request import BuildRequest, LoadOptions
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.types import CROP_MODES, INTERPOLATIONS, PRECISIONS, RECIPES, TASKS, VOID, format_size

MAX_BATCH = 4096
_RANDOM = "random"


class BuildOptions(TypedDict, total=False):
    """The options of `rdeploy build` with underscores; what the command line repeats takes one value or several."""

    scale: float | Sequence[float]
    """Fractions of the native side, above 0 and at most 1."""
    resolution: values.SizeLike | Sequence[values.SizeLike]
    """Input sizes in pixels, a side or (h, w), instead of `scale`."""
    at: str | Sequence[str]
    """Where the resolution is reduced: input, stem, after:MODULE, patch, tokens; joined by + they are used together."""
    fp32: bool
    """Build FP32 variants; so it is where no precision is named."""
    fp16: bool
    """Build FP16 variants."""
    int8: bool
    """Build INT8 variants; needs `calib`."""
    calib: str | os.PathLike[str] | None
    """Your own images for the INT8 ranges, or pkg:fn that yields them."""
    calib_samples: int
    """At most so many of them."""
    calibrator: str
    """How ranges are chosen."""
    recipe: str
    """What INT8 tries: by kind of network, or fast, scores, attention, or thorough."""
    max_drop: float | None
    """What INT8 may cost against FP32, in points; the layers that hurt most stay in float until it holds."""
    data: str | os.PathLike[str] | None
    """Labelled images: class folders, a CSV of path,label, or images/ and masks/."""
    void: int | Sequence[int]
    """Values of a mask that are no class, besides 255."""
    embed_preprocess: bool
    """Take uint8 pictures of the native size, and resize inside of the engine."""
    adapt: str
    """Whether crop, filter and BatchNorm statistics are searched for each lower resolution: auto, full or none."""
    finetune: str | os.PathLike[str] | None
    """Images to train each lower resolution on; labels are not needed."""
    finetune_epochs: int | None
    """Instead of as many as suit the number of images."""
    finetune_batch: int
    """Images for each step of the training."""
    finetune_optimizer: str
    """adamw, or sgd: for convolutional networks and long trainings."""
    finetune_rate: float | None
    """The training's highest learning rate, if not what is usual with the optimizer."""
    target: str
    """A profile's name, a YAML file, or auto."""
    backend: str | Sequence[str]
    """Instead of the target's backends."""
    batch: int | Sequence[int]
    """Instead of the target's batch sizes."""
    out: str | os.PathLike[str]
    """Where the bundles go."""
    seed: int
    """What is drawn at random follows it."""
    arch: str | None
    """The architecture of a state dict: timm:NAME, torchvision:NAME, hf:NAME, pkg.module:factory."""
    arch_kwargs: Mapping[str, Any]
    """Arguments for it."""
    random_init: bool
    """Do not load pretrained weights."""
    trust_pickle: bool
    """Allow a file to run code when it is opened; only for files of your own."""
    offline: bool
    """Never download anything."""
    task: str | None
    """classification, segmentation, detection or embedding, where the model does not say it; so with all below."""
    native_resolution: values.SizeLike | None
    """The size that the model was trained at."""
    mean: Sequence[float] | None
    """One number a channel, in 0..1."""
    std: Sequence[float] | None
    """One number a channel, in 0..1."""
    interpolation: str | None
    """The filter of the resize: bilinear, bicubic, and so on."""
    crop_pct: float | None
    """The share of the resized side that the crop keeps."""
    crop_mode: str | None
    """center keeps the proportions and cuts, squash sees the whole image."""


def build_request(model: str, options: BuildOptions, *, command: str = "") -> BuildRequest:
    """Check everything that can be checked without loading the model.

    Args:
        command: the command line that says the same; made from the options when empty.

    Raises:
        ConfigError: an option is unknown, out of range, or names something that is not there.
        MissingDependency: a backend was named that cannot build on this machine.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    _check_known(given)
    scales = tuple(_scale(value) for value in values.several(given.get("scale")))
    resolutions = tuple(values.parse_size(value, "resolution") for value in values.sizes(given.get("resolution")))
    precisions = tuple(name for name in PRECISIONS if given.get(name)) or ("fp32",)
    calib = _calibration(given.get("calib"), precisions)
    return BuildRequest(
        model=_model(model),
        scales=scales or (() if resolutions else (1.0,)),
        resolutions=resolutions,
        at=_at(given.get("at"), sized=bool(scales or resolutions)),
        precisions=precisions,
        calib=calib,
        calib_samples=values.whole(given.get("calib_samples", 256), "calib-samples", 1, 1_000_000),
        calibrator=_calibrator(given.get("calibrator", "auto")),
        recipe=_recipe(given.get("recipe", "auto")),
        max_drop=_max_drop(given.get("max_drop"), precisions),
        data=values.existing(given.get("data"), "data"),
        void=void_values(given.get("void")),
        embed_preprocess=bool(given.get("embed_preprocess")),
        adapt=str(values.one_of(given.get("adapt", "auto"), ADAPT, "adapt")),
        finetune=_finetune(
            given, sized=any(scale < 1 for scale in scales) or bool(resolutions) or bool(given.get("at"))
        ),
        target=target_name(given.get("target", "cpu")),
        backends=tuple(_backend(name) for name in values.several(given.get("backend"))),
        batch_sizes=tuple(values.whole(value, "batch", 1, MAX_BATCH) for value in values.several(given.get("batch"))),
        out=values.writable(given.get("out", ".")),
        seed=values.whole(given.get("seed", 0), "seed", 0, 2**32 - 1),
        load=load_options(given),
        command=command or command_line("build", model, given),
    )


def load_options(given: Mapping[str, Any]) -> LoadOptions:
    """Return the options that say how MODEL becomes a network; keys that belong to other stages are left alone."""
    mean, std = values.numbers(given.get("mean"), "mean"), values.numbers(given.get("std"), "std")
    if mean is not None and std is not None and len(mean) != len(std):
        raise ConfigError(f"mean has {len(mean)} values and std has {len(std)}; give one of each per channel")
    if std is not None and min(std) <= 0:
        raise ConfigError(f"std {min(std):g} is out of range: it divides, so it must be > 0")
    crop_pct = given.get("crop_pct")
    crop_pct = None if crop_pct is None else values.number(crop_pct, "crop-pct")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ConfigError(f"crop-pct {crop_pct:g} is out of range: it must be > 0 and <= 1 (0.875 is usual)")
    native = given.get("native_resolution")
    return LoadOptions(
        arch=given.get("arch"),
        arch_kwargs=tuple(dict(given.get("arch_kwargs") or {}).items()),
        random_init=bool(given.get("random_init")),
        trust_pickle=bool(given.get("trust_pickle")),
        offline=bool(given.get("offline")),
        seed=given.get("seed", 0),
        task=values.one_of(given.get("task"), TASKS, "task"),
        native_resolution=None if native is None else values.parse_size(native, "native-resolution"),
        mean=mean,
        std=std,
        interpolation=values.one_of(given.get("interpolation"), INTERPOLATIONS, "interpolation"),
        crop_pct=crop_pct,
        crop_mode=values.one_of(given.get("crop_mode"), CROP_MODES, "crop mode"),
    )


def void_values(declared: Any) -> tuple[int, ...]:
    """Return the values of a mask that are no class: 255, and those that were declared."""
    return tuple(sorted({VOID, *(values.whole(value, "void", 0, 65535) for value in values.several(declared))}))


def target_name(name: str) -> str:
    """Return the target with `auto` resolved, after its profile was found and read."""
    resolved = targets.auto() if name == "auto" else name
    targets.load(resolved)
    return resolved


def command_line(verb: str, model: str, options: Mapping[str, Any]) -> str:
    """Return the shell command that says the same as a call from Python."""
    words = ["rdeploy", verb, model]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] * value
        elif name in ("mean", "std"):
            words += [flag, ",".join(map(str, values.several(value)))]
        elif isinstance(value, Mapping):
            words += [word for key, item in value.items() for word in (flag, f"{key}={item}")]
        elif name in ("resolution", "native_resolution"):
            words += [
                word for size in values.sizes(value) for word in (flag, format_size(values.parse_size(size, name)))
            ]
        else:
            words += [word for item in values.several(value) for word in (flag, str(item))]
    return shlex.join(words)


def _check_known(given: Mapping[str, Any]) -> None:
    known = BuildOptions.__annotations__
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{plugins.did_you_mean(name, known)}")


def _model(model: str) -> str:
    if not str(model).strip():
        raise ConfigError("MODEL is empty; give timm:NAME, torchvision:NAME, hf:NAME, package.module:factory or a file")
    return str(model)


def _scale(value: Any) -> float:
    scale = values.number(value, "scale")
    if not (math.isfinite(scale) and 0 < scale <= 1):
        raise ConfigError(f"scale {scale:g} is out of range: it must be > 0 and <= 1 (0.75 turns 224 into 168)")
    return scale


def _at(value: Any, *, sized: bool) -> tuple[str, ...]:
    """Return the places; each needs a scale of its own or one for all, or it would change nothing."""
    wanted = tuple(str(one) for one in values.several(value)) or (resize.INPUT,)
    for text in wanted:
        places = resize.parse(text)
        open_ = [at for at, scale in places if scale is None]
        if open_ and not sized and text != resize.INPUT:
            raise ConfigError(f"at {text}: say how far with --scale, such as --scale 0.75, or write {open_[0]}@0.75")
        if sized and not open_ and len(wanted) == 1:
            raise ConfigError(f"at {text}: every place says its own scale, nothing is left for --scale or --resolution")
    return wanted


def _calibrator(name: str) -> str:
    values.one_of(name, ("auto", *plugins.names("rdeploy.quantize.calibrators")), "calibrator")
    return name


def _recipe(name: str) -> str:
    values.one_of(name, RECIPES, "recipe")
    return name


def _backend(name: str) -> str:
    if reason := backends.find(name).unavailable():
        raise MissingDependency(f"backend {name} cannot build here: {reason}")
    return name


def _calibration(value: Any, precisions: Sequence[str]) -> str | None:
    if value is None:
        if "int8" in precisions:
            raise ConfigError(
                "int8 needs images to find its ranges: give some of your own with --calib FOLDER "
                "(about 100 to 500; --calib random only to try the speed, it ruins the accuracy)"
            )
        return None
    text = str(os.fspath(value))
    return text if text == _RANDOM or _is_function(text) else values.existing(text, "calib")


def _max_drop(value: Any, precisions: Sequence[str]) -> float | None:
    if value is None:
        return None
    points = values.number(value, "max-drop")
    if not (math.isfinite(points) and 0 <= points < 100):
        raise ConfigError(
            f"max-drop {points:g} is out of range: it is in points of accuracy, from 0 to under 100 (0.5 is usual)"
        )
    if "int8" not in precisions:
        raise ConfigError("max-drop limits what INT8 may cost: give it together with --int8")
    return points


def _finetune(given: Mapping[str, Any], *, sized: bool) -> FinetuneOptions | None:
    """Return how to fine-tune; None where nobody asked for it."""
    data = values.existing(given.get("finetune"), "finetune")
    if data is None:
        if alone := next((name for name in _TRAINING if name in given), None):
            raise ConfigError(f"{alone.replace('_', '-')} says how to fine-tune: name the images with --finetune DIR")
        return None
    if not sized:
        raise ConfigError(
            "finetune makes a lower resolution good: say which with --scale or --resolution, such as --scale 0.75"
        )
    defaults = FinetuneOptions(data=data)
    epochs, rate = given.get("finetune_epochs"), given.get("finetune_rate")
    rate = None if rate is None else values.number(rate, "finetune-rate")
    if rate is not None and not (math.isfinite(rate) and 0 < rate <= 1):
        usual = " and ".join(f"{usual:g} with {name}" for name, usual in OPTIMIZERS.items())
        raise ConfigError(f"finetune-rate {rate:g} is out of range: it must be > 0 and <= 1 ({usual} are usual)")
    return FinetuneOptions(
        data=data,
        epochs=None if epochs is None else values.whole(epochs, "finetune-epochs", 1, 100_000),
        batch=values.whole(given.get("finetune_batch", defaults.batch), "finetune-batch", 2, MAX_BATCH),
        optimizer=values.one_of(given.get("finetune_optimizer"), OPTIMIZERS, "finetune-optimizer")
        or defaults.optimizer,
        learning_rate=rate,
    )


_TRAINING = ("finetune_epochs", "finetune_batch", "finetune_optimizer", "finetune_rate")


def _is_function(text: str) -> bool:
    module, colon, name = text.partition(":")
    return bool(colon) and not Path(text).exists() and all(part.isidentifier() for part in (*module.split("."), name))
