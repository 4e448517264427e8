"""Fine-tune a reduced network to answer as the native one does: a subject with training images goes in, new weights come out.

The teacher sees a random part of an image at the native resolution, the student the same part at its own (a consistent
teacher, Beyer et al. 2022); labels are not needed, and take part where there are any. Training ends early when the answers to
images that it does not train on have stopped to improve, and what is returned is the best state there was. It goes on where
it was after a kill, and a training that was interrupted ends, on a CPU, in the same weights to the last bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rdeploy.adapt import Change, Subject, _torch
from rdeploy.adapt._training import Training
from rdeploy.adapted import OPTIMIZERS
from rdeploy.errors import ConfigError

SEEN = 400_000
"""How many images a training sees unless it is told the epochs: many passes over few images, few over many."""
_MOST_EPOCHS, _LEAST_EPOCHS = 60, 8
_DECAYS = {"adamw": 0.02, "sgd": 5e-4}
LEAST_IMAGES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`epochs` None goes by the number of images. `patience` is the share of all rounds without progress that ends it, once
    the rate has fallen: as long as it is high, answers get worse before they get better. `learning_rate` and `weight_decay`
    None are those of the `optimizer`.

    `micro_batch` images go through the network at once and their gradients are added up; None is the whole batch, and less
    when a GPU's memory is full. With `amp` a GPU computes in half precision; "cpu" tries bfloat16 without one.
    """

    epochs: int | None = None
    batch: int = 64
    micro_batch: int | None = None
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup: float = 0.05
    temperature: float = 2.0
    label_weight: float = 0.2
    patience: float = 0.1
    round_steps: int = 1000
    checkpoint_s: float = 60.0
    amp: str = "auto"

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return OPTIMIZERS[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """By how much weights decay, times the learning rate, in a step."""
        return _DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay


def unsupported(subject: Subject, options: Options) -> str | None:
    """Return why this cannot be trained, in plain words."""
    if subject.module is None:
        return "an ONNX file holds no PyTorch module to train: give the original model"
    if subject.training is None:
        return "no images were given to train on (--finetune DIR)"
    if subject.spec.task == "detection":
        return "distillation is for classification, segmentation and embeddings: a detector needs its own training"
    if len(subject.training) < LEAST_IMAGES:
        return f"{len(subject.training)} images are left to train on, {LEAST_IMAGES} are the least: distillation needs thousands"
    if not any(p.is_floating_point() for p in subject.module.parameters()):
        return "the module has no parameters that could be trained: its weights are constants of an exported program"
    return None


def apply(subject: Subject, options: Options) -> Change | None:
    """Train, and return the best weights that were seen if they are better than those at the start."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(subject, options, plan(len(_views(subject)), options), device)
    try:
        outcome = training.run()
    finally:
        training.close()
    if outcome.state is None:
        return None
    return Change(detail=outcome.detail, state=outcome.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long a training is: `rounds` of `round_steps` steps (the last may be shorter), each followed by an examination."""

    images: int
    batch: int
    epochs: int
    epoch_steps: int
    round_steps: int

    @property
    def steps(self) -> int:
        return self.epochs * self.epoch_steps

    @property
    def rounds(self) -> int:
        return math.ceil(self.steps / self.round_steps)

    def ends_round(self, step: int) -> bool:
        """Whether an examination follows when `step` steps are done."""
        return step % self.round_steps == 0 or step == self.steps


def plan(images: int, options: Options) -> Plan:
    """Return how long to train on so many images."""
    batch = min(options.batch, images)
    epochs = options.epochs or min(_MOST_EPOCHS, max(_LEAST_EPOCHS, round(SEEN / images)))
    steps = images // batch
    return Plan(
        images=images, batch=batch, epochs=epochs, epoch_steps=steps, round_steps=min(steps, options.round_steps)
    )


def learning_rate(step: int, steps: int, options: Options) -> float:
    """Return the rate at a step: it rises linearly for the warm-up, then falls along a cosine to nothing."""
    rise = max(1.0, options.warmup * steps)
    if step < rise:
        return options.peak * (step + 1) / rise
    return options.peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def optimizer_of(weights: Sequence[Any], options: Options) -> Any:
    """Return the optimizer of some parameters; biases and the scales of normalisations (one axis) do not decay."""
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": options.decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.peak, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=options.peak)


def settles(step: int, steps: int, options: Options) -> bool:
    """Whether the rate has fallen far enough, to a quarter, for progress to be expected of every round."""
    return 2 * step > steps and learning_rate(step, steps, options) <= options.peak / 4


def loss_of(student: Any, teacher: Any, labels: Any, task: str, options: Options) -> Any:
    """Return how far the student's answer is from the teacher's (and from the labels); dense answers have the teacher's size.

    Class scores are compared as softened distributions (Hinton et al. 2015), embeddings by direction and by length.
    """
    student, teacher = student.float(), teacher.float()
    student = _torch.at_size(student, tuple(teacher.shape[2:]) if teacher.ndim == 4 else None)
    if task == "embedding":
        mine, theirs = student.flatten(1), teacher.flatten(1)
        away = (mine - theirs).square().sum(1) / theirs.square().sum(1).clamp(min=1e-12)
        return (1 - torch.nn.functional.cosine_similarity(mine, theirs, dim=1)).mean() + 0.5 * away.mean()
    if teacher.shape[1] == 1:  # yes or no
        student, teacher = (torch.cat([torch.zeros_like(one), one], 1) for one in (student, teacher))
    heat = options.temperature
    target = torch.softmax(teacher / heat, 1)
    divergence = (torch.special.xlogy(target, target) - target * torch.log_softmax(student / heat, 1)).sum(1)
    loss = heat * heat * divergence.mean()
    if labels is None:
        return loss
    return (1 - options.label_weight) * loss + options.label_weight * _wrong(student, labels)


def _wrong(scores: Any, labels: Any) -> Any:
    """Return the cross entropy with the labels; those of pixels are brought to the size of the scores, void ones left out.

    Raises:
        ConfigError: a label is no class of the network.
    """
    functional = torch.nn.functional
    if labels.max() >= scores.shape[1]:
        raise ConfigError(
            f"finetune: the labels hold class {int(labels.max())}, but the model has {scores.shape[1]} classes (0 to "
            f"{scores.shape[1] - 1}); if it means no class, say so with --void {int(labels.max())}"
        )
    if scores.ndim != 4:
        return functional.cross_entropy(scores, labels)
    labels = functional.interpolate(labels[:, None].float(), size=tuple(scores.shape[2:]), mode="nearest")[:, 0].long()
    return functional.cross_entropy(scores, labels, reduction="sum") / (labels >= 0).sum().clamp(min=1)


def trainable_copy(module: Any) -> Any:
    """Return a copy whose floating-point parameters take gradients, in training mode where the module has one."""
    student = copy.deepcopy(module)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student


def _views(subject: Subject) -> Any:
    assert subject.training is not None  # `unsupported` has asked
    return subject.training
