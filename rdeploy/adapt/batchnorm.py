"""Estimate BatchNorm's statistics again at the variant's resolution: a module and images go in, new statistics come out.

The statistics of the training do not fit feature maps of another size. Those of a few images are noisy, though, and alone
they can do harm; so both are mixed, with a weight that is chosen on images that the estimate has not seen (0 changes nothing).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rdeploy.adapt import Change, Pixels, Subject, _torch

_FITTED_ON = 2 / 3
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The weights of the new statistics that are tried."""

    weights: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(slots=True)
class Moments:
    """Sums over everything that one BatchNorm was given, in float64, from which mean and variance are had exactly."""

    count: int = 0
    total: Any = field(default=0.0)
    squares: Any = field(default=0.0)

    def add(self, values: Tensor) -> None:
        """Add activations (N, C, ...)."""
        flat = values.detach().transpose(0, 1).reshape(values.shape[1], -1).double()
        self.count += flat.shape[1]
        self.total = self.total + flat.sum(1)
        self.squares = self.squares + flat.square().sum(1)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance, as BatchNorm keeps it."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        return mean, variance * (self.count / max(1, self.count - 1))


def unsupported(subject: Subject, options: Options) -> str | None:
    """Return why there is nothing to estimate: no module, or one without BatchNorm; a detector's answers are not compared."""
    if subject.module is None:
        return "an ONNX file's BatchNorm is folded into its weights"
    if not _norms(subject.module):
        return "the network has no BatchNorm"
    if subject.spec.task == "detection":
        return "a detector's boxes are put right in the exported graph only"
    return None


def apply(subject: Subject, options: Options) -> Change | None:
    """Return the mixture of old and new statistics that does best, if one does better than the old ones."""
    count = len(subject.choosing.pictures)
    order = np.random.default_rng([subject.seed, 1]).permutation(count)
    fitted, judged = (sorted(part.tolist()) for part in np.split(order, [max(1, round(_FITTED_ON * count))]))
    (pixels,) = subject.choosing.pictures.pixels([subject.preprocessing], fitted)
    module = copy.deepcopy(subject.module)
    found = estimate(module, pixels, subject)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = _torch.runner(module, subject.spec, subject.dense_size)
    scores = {0.0: subject.score(run, subject.preprocessing, judged).order}
    for weight in options.weights:
        module.load_state_dict(before | mixed(before, found, weight))
        scores[weight] = subject.score(run, subject.preprocessing, judged).order
    best = max(scores, key=lambda weight: (scores[weight], -weight))
    if best == 0.0:
        return None
    detail = f"{best:g} of the statistics of {len(fitted)} images"
    return Change(detail=detail, state=before | mixed(before, found, best))


def estimate(module: nn.Module, pixels: Pixels, subject: Subject) -> dict[str, Tensor]:
    """Return new running means and variances by their names in the state dict; the module is left as it was.

    While it is watched every BatchNorm normalises with the statistics of its batch, so that a layer is fed what it will be fed
    when the layers before it have their new statistics.
    """
    norms, moments = _norms(module), {name: Moments() for name, _ in _norms(module)}
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with _watched(norms, moments), torch.inference_mode():
        for batch in _even_batches(pixels):
            images = torch.from_numpy(batch)
            module(_torch.normalised(images, subject.spec.preprocessing, _torch.device_of(module)))
    module.load_state_dict(saved)
    found = {}
    for name, norm in norms:
        if not moments[name].count:
            continue
        for key, value in zip(("running_mean", "running_var"), moments[name].mean_and_variance()):
            found[f"{name}.{key}".lstrip(".")] = value.to(getattr(norm, key).dtype)
    return found


def mixed(before: Mapping[str, Tensor], found: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Return `(1 - weight) * before + weight * found` for the statistics that were found."""
    return {name: torch.lerp(before[name].to(value), value, weight) for name, value in found.items()}


class _watched:
    """Inside the block BatchNorm layers use their batch's statistics, and what they are given is added up."""

    def __init__(self, norms: Sequence[tuple[str, _BatchNorm]], moments: Mapping[str, Moments]) -> None:
        self._norms, self._moments = norms, moments
        self._hooks: list[Any] = []
        self._modes: list[bool] = []

    def __enter__(self) -> None:
        for name, norm in self._norms:
            self._modes.append(norm.training)
            norm.train()
            seen = self._moments[name]
            self._hooks.append(norm.register_forward_pre_hook(lambda _, given, seen=seen: seen.add(given[0])))

    def __exit__(self, *unused: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for (_, norm), mode in zip(self._norms, self._modes):
            norm.train(mode)


def _even_batches(pixels: Pixels) -> Iterator[Pixels]:
    """Yield batches of nearly the same size, none of a single image (whose statistics of a 1 x 1 map do not exist)."""
    parts = max(1, len(pixels) // _BATCH)
    yield from (np.array(part) for part in np.array_split(pixels, parts))


def _norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
