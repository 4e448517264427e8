"""From a request to what a build works with: the target, the model, the images, and what is to be said about them.

Everything is found before any work is done, so that a wrong request costs nothing and writes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rdeploy import backends, models, rebuild, serde, targets
from rdeploy.build_request import BuildRequest
from rdeploy.data import advisor, boxes, calibration, images, pairs
from rdeploy.data.images import ImageSet
from rdeploy.errors import ConfigError, MissingDependency
from rdeploy.metrics import coco
from rdeploy.steps import Steps
from rdeploy.steps.model import LazyModel
from rdeploy.store import Store, default_root
from rdeploy.types import ModelSpec, Size, Target, Variant

REFERENCE = "onnxruntime"
"""Executes the FP32 graphs that others are compared with, and graphs whose own hardware is not here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What one `rdeploy build` works with; everything that its variants share."""

    request: BuildRequest
    steps: Steps
    model: LazyModel
    calib: ImageSet
    judged: ImageSet
    """The images that engines are verified on: the labelled ones, or else those of the calibration."""
    training: ImageSet | None = None
    """The images to fine-tune on; labels only where they are the model's own classes."""
    graphs_for: tuple[str, ...] = ()
    """The backends to make graphs for, in the target's order: those that build here, and TensorRT where it will build on the
    device."""

    @property
    def target(self) -> Target:
        return self.steps.target

    def input_size(self, variant: Variant) -> Size:
        """Return the size (h, w) of the images that a variant's engines take."""
        return self.spec.native_resolution if variant.embeds_preprocessing else variant.resolution

    @property
    def has_real_images(self) -> bool:
        """Whether the user gave images, so that what is found on them means something."""
        return (
            self.request.data is not None or self.request.calib not in (None, calibration.RANDOM) or bool(self.training)
        )

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def spec_of(self, variant: Variant) -> ModelSpec:
        """Return the model's facts with the preprocessing that suits a variant: how its graph's own input is made."""
        return self.spec if variant.preprocessing is None else replace(self.spec, preprocessing=variant.preprocessing)

    def fed(self, variant: Variant) -> ModelSpec:
        """Return the same for what goes into a variant's engines: pictures as the native model takes them, or `spec_of`."""
        return self.spec if variant.embeds_preprocessing else self.spec_of(variant)


def take_in(request: BuildRequest, progress: Callable[[str], None]) -> tuple[Build, tuple[str, ...]]:
    """Return what the build works with, and what the user should know about it.

    Raises:
        ConfigError: the images or the model are wrong.
        MissingDependency: none of the target's backends is installed.
    """
    steps = Steps(target=_target(request), store=Store(default_root()), progress=progress)
    if request.calib and calibration.is_path(request.calib):  # the images are quicker to look at than the model
        images.collect(pairs.images_below(request.calib), limit=1)
    with steps.stage("load", request.model):
        model = model_of(request, steps.store)
    training = None if request.finetune is None else _training(request.finetune.data, model)
    calib, judged, notes = _images(request, steps, model.spec, training)
    wanted = targets.load(request.target).backends if not request.backends else request.backends
    for name in wanted:
        if name not in steps.target.backends:
            later = (
                "its graph is in the bundle, to be built on the device"
                if name in rebuild.BUILDERS
                else "it was left out"
            )
            notes += (f"{name} is not built here, {later}: {backends.find(name).unavailable()}",)
    if model.spec.assumed:
        notes += (f"assumed, since the model does not say: {', '.join(model.spec.assumed)} (see --mean, --std, ...)",)
    graphs_for = tuple(name for name in wanted if name in steps.target.backends or name in rebuild.BUILDERS)
    return Build(
        request=request, steps=steps, model=model, calib=calib, judged=judged, training=training, graphs_for=graphs_for
    ), notes


def _target(request: BuildRequest) -> Target:
    """Return the target profile with the request's own backends and batch sizes, without the backends that are missing."""
    target = targets.load(request.target)
    target = replace(
        target,
        backends=request.backends or target.backends,
        batch_sizes=request.batch_sizes or target.batch_sizes,
    )
    missing = {name: reason for name in target.backends if (reason := backends.find(name).unavailable())}
    present = tuple(name for name in target.backends if name not in missing)
    if not present:
        raise MissingDependency(f"target {target.name}: none of its backends is here: {'; '.join(missing.values())}")
    if backends.find(REFERENCE).unavailable():
        raise MissingDependency("building needs ONNX Runtime to compare with", install="pip install 'rdeploy[cpu]'")
    return replace(target, backends=present)


def model_of(request: BuildRequest, store: Store) -> LazyModel:
    """Return the model; where a file or a name decides everything, its facts come from the cache and no torch is loaded."""
    key = models.source_key(request.model, request.load)
    if key is None:
        loaded = models.load(request.model, request.load)
        return LazyModel(loaded.spec, loaded.onnx, lambda: loaded)
    first: list[models.Loaded] = []

    def load() -> models.Loaded:
        if not first:
            first.append(models.load(request.model, request.load))
        return first[0]

    def write(folder: Path) -> None:
        facts = {"spec": load().spec, "onnx": load().onnx is not None}
        (folder / "model.json").write_text(serde.dumps(facts))

    facts = serde.loads((store.make("model", key, write) / "model.json").read_text())
    spec = replace(serde.from_json(ModelSpec, facts["spec"]), source=request.model)
    return LazyModel(spec, Path(request.model) if facts["onnx"] else None, load)


def _images(
    request: BuildRequest, steps: Steps, spec: ModelSpec, training: ImageSet | None
) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Return the calibration images, the images to judge on, and what is to be said about them."""
    data = _labelled(request.data, spec) if request.data else None
    notes: tuple[str, ...] = ()
    if request.calib:
        calib = calibration.collect_calibration(
            request.calib, limit=request.calib_samples, seed=request.seed, store=steps.store, spec=spec
        )
        if request.calib != calibration.RANDOM:
            pixels = images.load_pixels(steps.pixels(calib, spec.native_resolution, spec))
            notes = advisor.advise(calib, pixels, asked=request.calib_samples)
        else:
            notes = ("calibrated on random data, as asked: speed is real, accuracy is ruined",)
    elif data is None and training is not None:  # some of those to train on, which are then not trained on
        count = min(request.calib_samples, max(_FEWEST_HELD, len(training) // 10))
        calib = training.subset(sorted(random.Random(request.seed).sample(range(len(training)), count)))
        calib = replace(calib, labels=None)
    else:
        calib = data or calibration.stand_in_images(spec, seed=request.seed, store=steps.store)
        if data is None:
            notes = ("no images were given: engines were compared on random pictures, give --calib or --data",)
    if data is not None and data.skipped:
        name, reason = data.skipped[0]
        notes += (f"{len(data.skipped)} of the labelled images were left out: {name}: {reason}",)
    return calib, data or calib, notes


FEWEST_TO_TRAIN = 384
_FEWEST_HELD = 64


def _training(data: str, model: LazyModel) -> ImageSet:
    """Return the images to fine-tune on, with their labels where these are the model's own classes.

    Raises:
        ConfigError: there are too few, or the model is an ONNX file.
    """
    if model.onnx is not None:
        raise ConfigError(f"finetune needs the PyTorch model: {model.onnx.name} is an ONNX file, which is not trained")
    if model.spec.task == "detection":
        raise ConfigError(
            "finetune is for classification, segmentation and embeddings: a detector needs its own training"
        )
    found = _with_masks(data) if model.spec.task == "segmentation" else images.collect(data)
    if model.spec.task != "classification":
        found = replace(found, labels=None)  # folders are then no classes of the network
    elif found.labels is not None:
        try:
            found = images.collect(data, labelled=True, class_names=model.spec.labels)
        except ConfigError:
            found = replace(found, labels=None)
        if not model.spec.labels and not all(name.isdecimal() for name in found.class_names):
            found = replace(found, labels=None)  # sorted names need not be the model's order
        _check_classes(found, model, data)
    if len(found) < FEWEST_TO_TRAIN:
        raise ConfigError(
            f"finetune {data}: {len(found)} images are too few, {FEWEST_TO_TRAIN} are the least and thousands are what it takes"
        )
    return found


def _with_masks(data: str) -> ImageSet:
    """Return the images, with their masks where each has one."""
    folder = pairs.images_below(data)
    found = images.collect(folder)
    if folder == data:
        return found
    paired = pairs.collect_pairs(data)
    return paired if len(paired) == len(found) else found


def _check_classes(found: ImageSet, model: LazyModel, data: str) -> None:
    """Check that the labels are classes of the network; it runs once, where it has no names for them.

    Raises:
        ConfigError: some are not.
    """
    if not found.labels:
        return
    classes = len(model.spec.labels) or model.answers()
    strange = next((label for label in found.labels if not 0 <= label < classes), None)
    if strange is not None:
        raise ConfigError(
            f"finetune {data}: class {strange} is none of the model's {classes}, which count from 0 to {classes - 1}: name the "
            "folders (or labels) so"
        )


def _labelled(data: str, spec: ModelSpec) -> ImageSet:
    if spec.task == "segmentation":
        return pairs.collect_pairs(data)
    if spec.task == "detection":
        if reason := coco.unavailable():
            raise MissingDependency(reason)
        if spec.preprocessing.crop_mode != "squash":
            raise ConfigError(
                "boxes are scored where the network sees the whole image: build it with --crop-mode squash"
            )
        return boxes.collect_boxed(data)
    if spec.task == "embedding":
        return images.collect(data)
    return images.collect(data, labelled=True, class_names=spec.labels)
