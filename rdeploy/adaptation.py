"""The ladder: a variant goes in, the same with the preprocessing and the weights that suit its resolution comes out.

Each step of `rdeploy.adapt` proposes a change on images to choose by; it is kept only when it helps on others. Every step's
outcome lies in the store under the hash of what decides it, so a build that is repeated or killed does nothing twice.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rdeploy import adapt, resize, rungs, serde
from rdeploy.adapt import Change, Choosing, Pixels, Run, Subject
from rdeploy.adapted import Adaptation
from rdeploy.data import crops, images, preprocess
from rdeploy.data.images import ImageSet
from rdeploy.intake import Build
from rdeploy.metrics.closeness import Closeness, closeness
from rdeploy.plugins import make_options
from rdeploy.splits import LEAST, Split, split_images
from rdeploy.steps import export
from rdeploy.steps.made import versions
from rdeploy.steps.model import fill
from rdeploy.types import Preprocessing, Size, Variant

_METRICS = {"classification": "agreement", "segmentation": "pixels", "detection": "boxes", "embedding": "cosine"}
_NOTHING = "nothing better was found on the images to choose by"


def adapted(this: Build, variant: Variant) -> tuple[Variant, Adaptation | None]:
    """Return the variant as the ladder leaves it, and what each step gained; None where the resolution is the native one."""
    steps = [
        name
        for name in adapt.STEPS
        if (this.request.finetune is not None if name == "distill" else this.request.adapt != "none")
    ]
    if not steps or not resize.places_of(variant, this.spec.native_resolution):
        return variant, None
    split = split_images(this)
    if isinstance(split, str):
        return variant, Adaptation(reason=split)
    plain = replace(variant, precision="fp32", quant=None, preprocessing=None, weights="")
    reasons = []
    if this.request.adapt == "auto":
        macs = export.exported(this.steps, this.model, plain, this.judged).cost.macs
        split, too_much = afforded(split, macs)
        steps = [name for name in steps if name == "distill" or not too_much]
        reasons += [too_much] if too_much else []
        if not steps:
            return variant, Adaptation(reason=too_much)
    ladder = _Ladder(this=this, plain=plain, split=split)
    now = ladder.start()
    climbed = [now.rung]
    for name in steps:
        after = ladder.climb(name, now)
        if isinstance(after, str):
            reasons.append(f"{name}: {after}")
            continue
        climbed.append(after.rung)
        now = after if after.rung.kept else now
    found = Adaptation(
        metric="accuracy" if split.labelled else _METRICS[this.spec.task],
        images=len(split.judging),
        chosen_on=len(split.choosing),
        native_accuracy=ladder.native_accuracy(),
        rungs=tuple(climbed),
        reason="; ".join(reasons),
    )
    return replace(variant, preprocessing=now.variant.preprocessing, weights=now.variant.weights), found


def afforded(split: Split, macs: int) -> tuple[Split, str]:
    """Return as many of the images as a CPU gets through in minutes, and why the cheap steps are left out if it is too few."""
    choosing, judging = (int(WORK / (runs * max(1, macs))) for runs in (_RUNS_TO_CHOOSE, _RUNS_TO_JUDGE))
    fewest = LEAST // 2
    too_much = (
        ""
        if choosing >= fewest
        else f"{macs / 1e9:.0f} GMACs an image are too many to try this by itself: --adapt full"
    )
    return split.limited(max(fewest, choosing), max(LEAST, judging)), too_much


WORK = 1e13
"""Multiply-accumulates that the cheap steps may take by themselves: some minutes of two CPU cores."""
_RUNS_TO_CHOOSE, _RUNS_TO_JUDGE = 16, 4


@dataclass(slots=True, kw_only=True)
class _Ladder:
    """One variant's ladder, and what its steps share."""

    this: Build
    plain: Variant
    split: Split
    _native: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def start(self) -> rungs.Reached:
        """Return the plain lower resolution."""
        found = self._outcome("plain", self.plain, None, lambda folder: Change(detail=""))
        return rungs.read(found, "plain", self.plain, None)

    def climb(self, name: str, before: rungs.Reached) -> rungs.Reached | str:
        """Try a step; return how it did, or why there is nothing to do."""
        step, options, now = adapt.find(name), self._options(name), before.variant
        if name == "distill":
            # Another crop makes up for weights that were not trained; it cuts away what the native model sees.
            now = replace(now, preprocessing=None)

        def propose(folder: Path) -> Change | str:
            subject = self._subject(now, folder)
            if reason := step.unsupported(subject, options):
                return str(reason)
            with self.this.steps.stage("adapt", f"{name} {now.place}"):
                change: Change | None = step.apply(subject, options)
            return change or _NOTHING

        found = self._outcome(name, now, options, propose)
        reason = rungs.told(found).get("reason")
        return str(reason) if reason is not None else rungs.read(found, name, now, before)

    def native_accuracy(self) -> float | None:
        """Return the native model's accuracy on the judging images; None without labels."""
        if not self.split.labelled:
            return None
        native = self._answers("judging")
        return closeness(native, native, task=self.this.spec.task, labels=self.split.judging.labels).share

    def _outcome(self, name: str, now: Variant, options: Any, propose: Callable[[Path], Change | str]) -> Path:
        """Return the folder with a step's proposal and how it did, from the store or after trying it."""
        key = serde.digest([name, self._facts(now, name), options])
        store = self.this.steps.store

        def write(folder: Path) -> None:
            started, work = time.monotonic(), store.root / "checkpoints" / key
            change = propose(work)
            told: dict[str, Any] = {"reason": change} if isinstance(change, str) else {"detail": change.detail}
            if isinstance(change, Change):
                told["preprocessing"] = change.preprocessing
                rungs.save(folder, change, *self._examined(now, change))
            told["seconds"] = round(time.monotonic() - started, 1)
            (folder / "step.json").write_text(serde.dumps(told), encoding="utf-8")
            shutil.rmtree(work, ignore_errors=True)

        return store.make("adapt", key, write)

    def _facts(self, now: Variant, name: str) -> list[Any]:
        """Return what decides the outcome of a step besides its options."""
        split, spec = self.split, self.this.spec
        shas = [split.choosing.sha256, split.chooser_labels, split.judging.sha256]
        labels = split.judging.labels if split.labelled else None
        training: list[Any] = []
        if split.training is not None and name == "distill":
            training = [split.training.sha256, split.training.labels, self.this.request.void]
        native = [spec.sha256, spec.preprocessing, spec.native_resolution, spec.task]
        return [native, now, shas, labels, training, self.this.request.seed, versions()]

    def _options(self, name: str) -> Any:
        """Return a step's options; those of the training are the user's."""
        wanted = self.this.request.finetune if name == "distill" else None
        names = ("epochs", "batch", "optimizer", "learning_rate")
        given = {} if wanted is None else {name: getattr(wanted, name) for name in names}
        return make_options(adapt.find(name).Options, given, where=name)

    def _subject(self, now: Variant, folder: Path) -> Subject:
        this = self.this
        native = self._answers("choosing")
        onnx = this.model.onnx is not None
        return Subject(
            name=now.place,
            spec=this.spec,
            resolution=now.resolution,
            preprocessing=this.spec_of(now).preprocessing,
            module=None if onnx else export.module_of(this.steps, this.model, now),
            native=None if onnx else this.model.resized(()),
            run=self._runner(now),
            choosing=Choosing(pictures=self._pictures("choosing"), native=native, labels=self.split.chooser_labels),
            names=self._names(),
            sees_crop=adapt.dense_size(native, this.spec.task) is None
            and this.spec.task != "detection"
            and not self.plain.embeds_preprocessing,
            training=self._views(now),
            seed=this.request.seed,
            folder=folder,
            tell=this.steps.progress,
        )

    def _views(self, now: Variant) -> crops.RandomParts | None:
        if self.split.training is None:
            return None
        spec = self.this.spec
        return crops.RandomParts(
            images=self.split.training,
            labels=self.split.training.labels,
            channels=spec.channels,
            native=spec.native_resolution,
            native_preprocessing=spec.preprocessing,
            resolution=now.resolution,
            preprocessing=self.this.spec_of(now).preprocessing,
            seed=self.this.request.seed,
            void=self.this.request.void,
        )

    def _images(self, which: str) -> ImageSet:
        return self.split.choosing if which == "choosing" else self.split.judging

    def _pictures(self, which: str) -> _Pictures:
        spec = self.this.spec
        outer = (spec.native_resolution, spec.preprocessing) if self.plain.embeds_preprocessing else None
        return _Pictures(self._images(which), self.plain.resolution, spec.channels, outer)

    def _answers(self, which: str) -> list[NDArray[Any]]:
        """Return the native model's answers to the images to choose by or to judge on."""
        if which not in self._native:
            this, found = self.this, self._images(which)
            pixels = images.load_pixels(this.steps.pixels(found, this.spec.native_resolution, this.spec))
            with this.steps.stage("adapt", f"{len(found)} native answers"):
                run = self._graph_runner(Variant(resolution=this.spec.native_resolution))
                self._native[which] = adapt.answers_of(run, pixels, this.spec, self._names())
        return self._native[which]

    def _examined(self, now: Variant, change: Change) -> tuple[Closeness, Closeness | None]:
        """Return how a change does on the judging images: against the native model, and against the labels."""
        this, spec = self.this, self.this.spec
        native = self._answers("judging")
        with this.steps.stage("adapt", f"judge {now.place} on {len(self.split.judging)} images"):
            pictures = self._pictures("judging")
            (pixels,) = pictures.pixels([change.preprocessing or this.spec_of(now).preprocessing], range(len(pictures)))
            mine = adapt.answers_of(self._runner(now, change.state), pixels, spec, self._names())
        labels = self.split.judging.labels if self.split.labelled else None
        correct = None if labels is None else closeness(mine, native, task=spec.task, labels=labels)
        return closeness(mine, native, task=spec.task), correct

    def _runner(self, now: Variant, state: dict[str, Any] | None = None) -> Run:
        """Return what runs a variant: its exported graph; with weights of its own, or to be tried, the module itself."""
        if not now.weights and state is None:
            return self._graph_runner(replace(now, preprocessing=None))
        from rdeploy.adapt import _torch

        module = export.module_of(self.this.steps, self.this.model, now)
        if state is not None:
            module = copy.deepcopy(module)
            fill(module, state)
        size = adapt.dense_size(self._answers("judging"), self.this.spec.task)
        return _torch.runner(module, self.this.spec, size)

    def _graph_runner(self, variant: Variant) -> Run:
        this = self.this
        onnx = export.exported(this.steps, this.model, variant, this.judged).onnx
        names = [value.name for value in onnx.outputs]

        def run(pixels: Pixels) -> Iterator[Sequence[NDArray[Any]]]:
            from rdeploy.quantize.ranges import activations

            batches = (
                preprocess.normalise(pixels[row : row + 1], this.spec.preprocessing) for row in range(len(pixels))
            )
            for values in activations(Path(onnx.path), names, batches, threads=this.target.threads):
                yield [values[name] for name in names]

        return run

    def _names(self) -> tuple[str, ...]:
        """Return the outputs' names: a detector's form can depend on them."""
        native = Variant(resolution=self.this.spec.native_resolution)
        return tuple(
            value.name
            for value in export.exported(self.this.steps, self.this.model, native, self.this.judged).onnx.outputs
        )


@dataclass(frozen=True, slots=True)
class _Pictures:
    """Images as a variant sees them; with `outer` cut to the native size first, as an engine with the resize inside gets them."""

    images: ImageSet
    resolution: Size
    channels: int
    outer: tuple[Size, Preprocessing] | None

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, preprocessings: Sequence[Preprocessing], rows: Sequence[int]) -> list[Pixels]:
        """Return the chosen images under each preprocessing; every image is read once."""
        chosen = self.images if len(rows) == len(self.images) else self.images.subset(rows)
        if self.outer is None:
            return preprocess.prepare_each(chosen, self.resolution, preprocessings, channels=self.channels)
        (native,) = preprocess.prepare_each(chosen, self.outer[0], [self.outer[1]], channels=self.channels)
        return [preprocess.shrink(native, self.resolution, one) for one in preprocessings]
