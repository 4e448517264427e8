"""Resolution as a compression axis: one module per place where the resolution is reduced, and their composition.

A method defines `Options`, `unsupported(module, spec, resolution, options) -> str | None` (the reason in plain words),
`snap(module, spec, resolution, options) -> Size` (the nearest resolution that the model can take) and
`apply(module, spec, resolution, options) -> Module` (a new module; the one that came in is left untouched). `resolution` is
that of the images on which a network would do as much work behind the place. A method that has something to choose defines
`fit(module, spec, resolution, options, images) -> Options` (`images`, each (1, C, H, W), may be None) and `said(options) -> str`
as well.

A place is written `input`, `stem`, `after:layer1`; several are joined by `+` and may say their own scale:
`input@0.75+tokens@0.8`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rdeploy import plugins
from rdeploy.errors import ConfigError, Unsupported
from rdeploy.types import ModelSpec, Options, Size, Variant, format_size

INPUT = "input"
_ORDER = (INPUT, "patch", "stem", "after", "tokens")
"""Along the data: what comes first decides what the next one finds."""


class ResizeMethod(Protocol):
    """What a module in this folder defines."""

    Options: type

    def unsupported(self, module: Any, spec: ModelSpec, resolution: Size, options: Any) -> str | None: ...

    def snap(self, module: Any, spec: ModelSpec, resolution: Size, options: Any) -> Size: ...

    def apply(self, module: Any, spec: ModelSpec, resolution: Size, options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the resolution is reduced, and to what.

    Behind it the network works as much as the one before it would on images of `resolution` (h, w).
    """

    at: str
    resolution: Size
    options: Options = ()

    @property
    def method(self) -> str:
        """The plugin's name: `after` of `after:layer1`."""
        return self.at.partition(":")[0]


def find(name: str) -> Any:
    """Import a resize method by name; the result satisfies `ResizeMethod`."""
    return plugins.find("rdeploy.resize", name)


def parse(text: str) -> tuple[tuple[str, float | None], ...]:
    """Return the places of `--at` with the scale that each says for itself, in the order in which data meets them.

    Raises:
        ConfigError: a place is unknown or named twice, a scale is no fraction, or `after` names no module.
    """
    found: dict[str, float | None] = {}
    for part in text.split("+"):
        at, _, scale = part.strip().partition("@")
        method, colon, module = at.partition(":")
        known = plugins.names("rdeploy.resize")
        if method not in known:
            near = plugins.did_you_mean(method, known)
            raise ConfigError(f"unknown resize method {method!r}{near}; there are: {', '.join(known)}")
        if bool(colon and module) != (method == "after"):
            raise ConfigError(f"at {at}: write after:MODULE, such as after:layer1; the other places take no module")
        if at in found:
            raise ConfigError(f"at {text}: {at} is named twice")
        found[at] = _fraction(scale, part) if "@" in part else None
    order = {name: index for index, name in enumerate(_ORDER)}
    return tuple(sorted(found.items(), key=lambda one: order.get(one[0].partition(":")[0], len(order))))


def _fraction(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(f"at {part}: the scale after @ must be a number > 0 and <= 1, such as stem@0.75")
    return value


def asked(text: str, native: Size, *, scale: float | None = None, resolution: Size | None = None) -> tuple[Place, ...]:
    """Return the places of `--at` with their resolutions: by their own scale, else by `scale` or `resolution`.

    Each place counts from what the places before it have left. One that changes nothing is left out.
    """
    places = []
    for at, own in parse(text):
        factor = own if own is not None else scale
        size = (
            resolution if own is None and resolution is not None else scaled(native, 1.0 if factor is None else factor)
        )
        if size != native:
            places.append(Place(at=at, resolution=size))
        native = size if at == INPUT else native
    return tuple(places)


def scaled(size: Size, factor: float) -> Size:
    """Return a size times a factor, in whole pixels, at least one."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def variant_of(variant: Variant, places: Sequence[Place], native: Size) -> Variant:
    """Return the variant with these places: `resolution` is what the network is given, `at` and `resize_options` say the rest."""
    at_input = next((place for place in places if place.at == INPUT), None)
    inside = [place for place in places if place.at != INPUT]
    return replace(
        variant,
        resolution=at_input.resolution if at_input else native,
        at="+".join(place.at for place in places) or INPUT,
        resize_options=tuple((place.at, (("resolution", place.resolution), *place.options)) for place in inside),
    )


def places_of(variant: Variant, native: Size) -> tuple[Place, ...]:
    """Return the places of a variant, in their order; none for the native one."""
    places = []
    for at in variant.at.split("+"):
        if at == INPUT:
            places += [Place(at=INPUT, resolution=variant.resolution)] * (variant.resolution != native)
            continue
        (_, resolution), *options = dict(variant.resize_options)[at]
        places.append(Place(at=at, resolution=tuple(resolution), options=tuple(options)))
    return tuple(places)


def settle(module: Any, spec: ModelSpec, place: Place, images: Sequence[Any] | None) -> Place:
    """Return the place at a resolution that the module can take, with options searched on `images` where it has any.

    Raises:
        ConfigError: the place does not exist in this module.
        Unsupported: the module cannot be reduced there, or the nearest size that it takes is its own.
    """
    method, options, asked = find(place.method), _options(place), place.resolution
    place = replace(place, resolution=method.snap(module, spec, asked, options))
    if place.resolution == spec.native_resolution != asked:
        reason = method.unsupported(module, spec, asked, options) or "no other size is nearer"
        nearest = f"the size nearest to {format_size(asked)} that this model takes is its own, {format_size(place.resolution)}"
        raise Unsupported(f"nothing would be reduced at {place.at}: {nearest}: {reason}")
    if reason := method.unsupported(module, spec, place.resolution, options):
        raise Unsupported(reason)
    if hasattr(method, "fit"):
        place = replace(place, options=_pairs(method.fit(module, spec, place.resolution, options, images)))
    return place


def said(place: Place) -> str | None:
    """Return what a user should know of a settled place, where its method has something to say."""
    method = find(place.method)
    return str(method.said(_options(place))) if hasattr(method, "said") else None


def apply(module: Any, spec: ModelSpec, places: Sequence[Place]) -> Any:
    """Return a new module that is reduced at all the places, one after the other.

    Raises:
        Unsupported: one of the methods refuses.
    """
    if not places and find(INPUT).resamples_itself(module):
        return find(INPUT).apply(module, spec, spec.native_resolution, find(INPUT).Options())
    for place in places:
        module = find(place.method).apply(module, spec, place.resolution, _options(place))
        spec = after_place(spec, place)
    return module


def after_place(spec: ModelSpec, place: Place) -> ModelSpec:
    """Return the spec with the image size that the module takes once it is reduced at `place`."""
    return replace(spec, native_resolution=place.resolution) if place.at == INPUT else spec


def _options(place: Place) -> Any:
    given: Mapping[str, Any] = dict(place.options)
    module = place.at.partition(":")[2]
    return plugins.make_options(
        find(place.method).Options, {**given, **({"module": module} if module else {})}, where=f"at {place.at}"
    )


def _pairs(options: Any) -> Options:
    return tuple((field.name, getattr(options, field.name)) for field in dataclasses.fields(options))
