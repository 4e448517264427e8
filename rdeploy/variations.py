"""The part of a search's space that cannot be enumerated: which layers stay in float, how many tokens each block merges.

Layers are taken in groups along the network, and a schedule as a weight for each quarter of the blocks: a handful of choices
that a sampler can learn from, with thousands of combinations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rdeploy import resize, serde
from rdeploy.errors import Unsupported
from rdeploy.intake import Build
from rdeploy.sampling import Choices, Dimension, spread
from rdeploy.steps import export
from rdeploy.types import QuantOptions, Variant

GROUPS, QUARTERS = 8, 4
_WEIGHTS = (0, 1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The dimensions, and what their choices are made into: variants by place, the layers of each group."""

    dimensions: tuple[Dimension, ...]
    places: Mapping[str, Variant]
    groups: Mapping[str, tuple[tuple[str, ...], ...]]
    """Place -> the layers of each group, since a graph's layers may differ from place to place."""
    quant: QuantOptions | None


def space_of(this: Build, places: Sequence[Variant], quant: QuantOptions | None) -> Space:
    """Return the space around FP32 variants that were found worth it.

    Args:
        quant: how INT8 is made; None where it is not searched, and only schedules vary.

    Raises:
        Unsupported: neither INT8 nor merged tokens are searched, so that all there is can be enumerated.
    """
    merging = [place for place in places if _merges(place)]
    kept = {place.id: place for place in (places if quant is not None else merging)}
    if not kept:
        raise Unsupported("nothing to sample: without --int8 and without --at tokens every point can be enumerated")
    dimensions = [Dimension("place", tuple(kept))]
    if quant is not None:
        dimensions += [Dimension(f"float-{index}", (0, 1)) for index in range(GROUPS)]
    if quant is not None and merging and "fp32" in this.request.precisions:
        dimensions.append(Dimension("precision", ("fp32", "int8")))
    if merging:
        dimensions += [Dimension(f"merge-{index}", _WEIGHTS) for index in range(QUARTERS)]
    groups = {name: _groups(this, place) for name, place in kept.items()} if quant is not None else {}
    return Space(dimensions=tuple(dimensions), places=kept, groups=groups, quant=quant)


def variant_of(this: Build, space: Space, choices: Choices) -> Variant:
    """Return the variant that the choices stand for; equal choices give equal variants, with a name of their own.

    No group in float is the plain INT8 variant, which has been enumerated.

    Raises:
        Unsupported: the schedule cannot be had.
    """
    place = space.places[str(choices["place"])]
    precision = str(choices.get("precision", "int8" if space.quant is not None else "fp32"))
    variant = place
    told: list[Any] = []
    if _merges(place):
        weights = [choices[f"merge-{index}"] for index in range(QUARTERS)]
        variant = _rescheduled(this, place, weights if any(weights) else [1] * QUARTERS)
        told.append(variant.resize_options)
    quant = None
    if precision == "int8" and space.quant is not None:
        names = [n for i, group in enumerate(space.groups[place.id]) if choices[f"float-{i}"] for n in group]
        if len(names) == sum(map(len, space.groups[place.id])):
            raise Unsupported("all layers in float: that is the FP32 variant")
        quant = replace(space.quant, keep_float=tuple(names))
        told += names
    sample = f"s{serde.digest(told)[:5]}" if told else ""
    return replace(variant, precision=precision, quant=quant, sample=sample)


def _merges(variant: Variant) -> bool:
    return "tokens" in dict(variant.resize_options)


def _groups(this: Build, place: Variant) -> tuple[tuple[str, ...], ...]:
    """Return the names of the layers that INT8 would quantize, in as many groups along the network."""
    from rdeploy.graph import cost

    exported = export.exported(this.steps, this.model, place, this.judged)
    names = [layer.name for layer in cost.layers(Path(exported.onnx.path)) if layer.macs]
    return tuple(tuple(names[i * len(names) // GROUPS : (i + 1) * len(names) // GROUPS]) for i in range(GROUPS))


def _rescheduled(this: Build, variant: Variant, weights: Sequence[str | int]) -> Variant:
    """Return a variant whose blocks merge tokens in these proportions, within the same number of multiply-accumulates."""
    native = this.spec.native_resolution
    places = resize.places_of(variant, native)
    before = tuple(place for place in places if place.at != "tokens")
    tokens = next(place for place in places if place.at == "tokens")
    spec = this.spec
    for place in before:
        spec = resize.after_place(spec, place)
    module = this.model.resized(before)
    method = resize.find("tokens")
    schedule = method.schedule_of(module, spec, tokens.resolution, lambda blocks: spread(weights, blocks))
    changed = replace(tokens, options=(("schedule", schedule),))
    return resize.variant_of(variant, [changed if place is tokens else place for place in places], native)
