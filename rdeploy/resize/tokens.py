"""Fewer tokens for a plain vision transformer: similar patches are merged on the way, by a schedule that is fixed beforehand.

The image keeps its size. `resolution` sets the budget: the multiply-accumulates that the blocks would take on an image of
that size. How many tokens each block merges within it is searched on the calibration images (as DiffRate, arXiv 2305.17997,
learns it): the schedule whose outputs are closest to the unmerged network's. Without images every block merges as many (ToMe).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.resize import _insert, _transformers, _transformers_vit
from rdeploy.resize._merging import MOST, MergingBlocks
from rdeploy.resize._names import plain_name
from rdeploy.resize._torchvision_vit import is_torchvision_vit
from rdeploy.types import ModelSpec, Size, format_size

Schedule = tuple[int, ...]
SEARCH_IMAGES = 24
SEARCH_TRIALS = 24
_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`schedule` is how many tokens each block merges; empty until it is chosen."""

    schedule: Schedule = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a schedule's cost depends on: tokens, and the multiply-accumulates of a block per token and per pair of tokens."""

    prefix: int
    patches: int
    width: int
    attention: int
    mlp: int
    blocks: int

    def macs(self, schedule: Sequence[int]) -> float:
        """Return the multiply-accumulates of all blocks, the merging itself included."""
        total, left = 0.0, float(self.patches)
        for count in schedule:
            total += self._attention(left + self.prefix)
            if count:
                total += (left / 2) * (left / 2) * self.width + (left - count) * (left / 2) * self.width
            left -= count
            total += (left + self.prefix) * self.mlp
        return total

    def budget(self, share: float) -> float:
        """Return the multiply-accumulates of all blocks with a share of the patches from the first one on."""
        count = self.prefix + share * self.patches
        return self.blocks * (self._attention(count) + count * self.mlp)

    def _attention(self, count: float) -> float:
        return count * self.attention + 2 * count * count * self.width

    def spread(self, weights: Sequence[float], budget: float) -> Schedule:
        """Return the schedule in proportion to `weights` that merges no more than the budget asks for."""
        low, high = 0.0, float(self.patches * self.blocks)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.macs(self._clipped(weights, middle)) <= budget else (middle, high)
        return self._clipped(weights, high)

    def _clipped(self, weights: Sequence[float], amount: float) -> Schedule:
        found, left, total = [], self.patches, sum(weights) or 1.0
        owed = 0.0
        for weight in weights:
            owed += amount * weight / total
            count = max(0, min(int(owed), -(-left // 2) - 1, MOST))
            owed -= int(owed)
            found.append(count)
            left -= count
        return tuple(found)


def unsupported(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> str | None:
    """Return in plain words why the module's tokens cannot be merged, or None: they were, once."""
    try:
        _insert.run(apply(module, spec, resolution, options), spec, spec.native_resolution)
    except Unsupported as error:
        return str(error)
    return None


def snap(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> Size:
    """Return the resolution, or the smallest one whose budget can be met: a block merges less than half of its tokens."""
    if _refused(module) is not None:
        return resolution
    shape = _shape(module, spec)
    least = shape.macs(shape.spread([1.0] * shape.blocks, 0.0))
    height, width = spec.native_resolution
    wanted, share = resolution, resolution[0] * resolution[1] / (height * width)
    while share < 1 and shape.budget(share) < least:
        share = min(1.0, share * 1.02)
        wanted = (min(height, round(height * share**0.5)), min(width, round(width * share**0.5)))
    return wanted


def apply(module: nn.Module, spec: ModelSpec, resolution: Size, options: Options) -> nn.Module:
    """Return a copy that merges tokens, with as many multiply-accumulates as `resolution` (h, w) would take.

    Raises:
        Unsupported: it is no plain vision transformer, or the schedule does not fit it.
    """
    reason = _refused(module) or _insert.larger(resolution, spec.native_resolution)
    if reason is not None:
        raise Unsupported(reason)
    shape = _shape(module, spec)
    schedule = options.schedule or shape.spread([1.0] * shape.blocks, _budget(shape, spec, resolution))
    return _merging(module, shape, schedule)


def fit(
    module: nn.Module, spec: ModelSpec, resolution: Size, options: Options, images: Sequence[NDArray[np.float32]] | None
) -> Options:
    """Return the schedule: the one given, else the closest to the unmerged network on `images`, else an even one."""
    if options.schedule:
        return options
    shape = _shape(module, spec)
    budget = _budget(shape, spec, resolution)
    if images is None:
        return Options(schedule=shape.spread([1.0] * shape.blocks, budget))
    batches = _batches(images, next(p.dtype for p in module.parameters() if p.is_floating_point()))
    exact = [_answers(module, batch) for batch in batches]

    def error(schedule: Schedule) -> float:
        merging = _merging(module, shape, schedule)
        pairs = [(_answers(merging, batch), wanted) for batch, wanted in zip(batches, exact)]
        return float(np.mean([((a - b) ** 2).sum(-1).mean() / (b**2).sum(-1).mean() for a, b in pairs]))

    return Options(schedule=search(shape, budget, error))


def schedule_of(
    module: nn.Module, spec: ModelSpec, resolution: Size, weights: Callable[[int], Sequence[float]]
) -> Schedule:
    """Return the schedule in proportion to `weights` (of as many blocks as there are) within the resolution's budget.

    Raises:
        Unsupported: no schedule in these proportions merges enough.
    """
    shape = _shape(module, spec)
    budget = _budget(shape, spec, resolution)
    schedule = shape.spread(weights(shape.blocks), budget)
    if shape.macs(schedule) > budget * 1.001:
        raise Unsupported("these blocks cannot merge as many tokens as the budget asks for")
    return schedule


def said(options: Options) -> str:
    """Return what the schedule is."""
    return f"tokens merged in each block: {', '.join(map(str, options.schedule))}"


def search(shape: Shape, budget: float, error: Callable[[Schedule], float], *, trials: int = SEARCH_TRIALS) -> Schedule:
    """Return the schedule within the budget with the smallest error that was found in at most `trials` evaluations.

    Ramps of several steepness and late starts come first; then the best one is bent, a third of the blocks at a time.
    """
    last = max(1, shape.blocks - 1)
    shapes = [[1 + slope * (2 * i / last - 1) for i in range(shape.blocks)] for slope in (0.0, -0.9, 0.9, -0.5, 0.5)]
    shapes += [[float(i >= start * shape.blocks) for i in range(shape.blocks)] for start in (0.25, 0.5)]
    tried: dict[Schedule, float] = {}

    def attempt(weights: list[float]) -> tuple[float, list[float]]:
        schedule = shape.spread(weights, budget)
        if schedule not in tried:
            tried[schedule] = error(schedule) if shape.macs(schedule) <= budget * 1.001 else float("inf")
        return tried[schedule], weights

    best = min((attempt(weights) for weights in shapes), key=lambda one: one[0])
    third = max(1, shape.blocks // 3)
    strength = 2.0
    while len(tried) < trials and strength > 1.05:
        bends = [
            _bent(best[1], start, third, by)
            for start in range(0, shape.blocks, third)
            for by in (strength, 1 / strength)
        ]
        better = min(
            (attempt(one) for one in bends[: max(0, trials - len(tried))]), key=lambda one: one[0], default=best
        )
        best, strength = (better, strength) if better[0] < best[0] else (best, strength**0.5)
    return min(tried, key=lambda schedule: tried[schedule])


def _bent(weights: list[float], start: int, length: int, by: float) -> list[float]:
    return [weight * by if start <= i < start + length else weight for i, weight in enumerate(weights)]


def _budget(shape: Shape, spec: ModelSpec, resolution: Size) -> float:
    height, width = spec.native_resolution
    return shape.budget(resolution[0] * resolution[1] / (height * width))


def _merging(module: nn.Module, shape: Shape, schedule: Schedule) -> nn.Module:
    left = shape.patches
    for count in schedule:
        if not 0 <= count < max(1, -(-left // 2)) or count > MOST:
            raise Unsupported(f"a block cannot merge {count} of {left} tokens")
        left -= count
    if len(schedule) != shape.blocks:
        raise Unsupported(f"the schedule is for {len(schedule)} blocks, and the network has {shape.blocks}")
    merged = copy.deepcopy(module)
    if not any(schedule):
        return merged
    part: Any = _find(merged)
    blocks = _blocks(part)
    new = MergingBlocks(
        list(blocks), schedule, prefix=shape.prefix, patches=shape.patches, restore=_reads_patches(part)
    )
    if is_torchvision_vit(part):
        part.encoder.layers = nn.Sequential(new)
    elif name := _transformers_vit.blocks_name(part):
        setattr(part, name, nn.ModuleList([new]))
    else:
        part.blocks = nn.Sequential(new)
    return merged


def _refused(module: nn.Module) -> str | None:
    part = _find(module)
    if part is None:
        return (
            f"{plain_name(module)} is no plain vision transformer (timm's VisionTransformer and DeiT, torchvision's vit, "
            "transformers' ViT, DINOv2, CLIP and SigLIP): its tokens cannot be merged"
        )
    strange = next((block for block in _blocks(part) if not _is_plain(block)), None)
    return (
        None
        if strange is None
        else f"its blocks are of the kind {type(strange).__name__}, whose tokens cannot be merged"
    )


def _find(module: nn.Module) -> Any | None:
    """Return the outermost plain vision transformer inside the module; neither library is imported to find out."""
    models = sys.modules.get("timm.models.vision_transformer")
    if is_torchvision_vit(module) or (models is not None and isinstance(module, models.VisionTransformer)):
        return module
    if _transformers_vit.blocks_name(module):
        return module
    return next((found for child in module.children() if (found := _find(child)) is not None), None)


def _is_plain(block: Any) -> bool:
    if _transformers_vit.is_layer(block):
        return True
    if type(block).__name__ == "EncoderBlock":
        return isinstance(getattr(block, "self_attention", None), nn.MultiheadAttention)
    models = sys.modules.get("timm.models.vision_transformer")
    return models is not None and type(block) is models.Block and type(block.attn).__name__ == "Attention"


def _blocks(part: Any) -> Any:
    if name := _transformers_vit.blocks_name(part):
        return getattr(part, name)
    return part.encoder.layers if is_torchvision_vit(part) else part.blocks


def _reads_patches(part: Any) -> bool:
    """Whether what comes after the blocks looks at more than the class token (of transformers' networks nobody knows)."""
    if _transformers_vit.blocks_name(part):
        return True
    return not is_torchvision_vit(part) and (part.global_pool != "token" or part.attn_pool is not None)


def _shape(module: nn.Module, spec: ModelSpec) -> Shape:
    part: Any = _find(module)
    blocks = _blocks(part)
    seen: list[torch.Tensor] = []
    handle = blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        _insert.run(module, spec, spec.native_resolution)
    except Exception as error:
        raise Unsupported(f"{plain_name(module)} cannot take {format_size(spec.native_resolution)}: {error}") from error
    finally:
        handle.remove()
    prefix = _prefix(module, part, spec, seen[0].shape[1])
    first = blocks[0]
    attention = next(getattr(first, name) for name in _ATTENTION if hasattr(first, name))
    return Shape(
        prefix=prefix,
        patches=seen[0].shape[1] - prefix,
        width=seen[0].shape[2],
        attention=_weights(attention),
        mlp=_weights(first.mlp),
        blocks=len(blocks),
    )


_ATTENTION = ("attn", "self_attention", "attention", "self_attn")


def _prefix(module: nn.Module, part: Any, spec: ModelSpec, tokens: int) -> int:
    """Return how many of the tokens are no patches."""
    if is_torchvision_vit(part):
        return 1
    if not _transformers_vit.blocks_name(part):
        return int(part.num_prefix_tokens)
    embedding = next(inner for inner in module.modules() if _transformers.has_positions(inner))
    height, width = _transformers.patch_size(embedding)
    return tokens - (spec.native_resolution[0] // height) * (spec.native_resolution[1] // width)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def _batches(images: Sequence[NDArray[np.float32]], dtype: torch.dtype) -> list[torch.Tensor]:
    count = min(SEARCH_IMAGES, len(images))
    chosen = [images[round(i * len(images) / count)] for i in range(count)]
    return [
        torch.from_numpy(np.concatenate(chosen[start : start + _BATCH])).to(dtype) for start in range(0, count, _BATCH)
    ]


def _answers(module: nn.Module, batch: torch.Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        output = module(batch)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    found: NDArray[np.float32] = output.float().flatten(1).numpy()
    return found
