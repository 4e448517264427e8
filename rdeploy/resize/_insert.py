"""Find a place inside a network by running it, and put an anti-aliased downscale behind it: module in, new module out."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rdeploy.errors import Unsupported
from rdeploy.resize import input as resized
from rdeploy.resize._downscale import Downscale
from rdeploy.resize._names import reason_of
from rdeploy.types import ModelSpec, Size, format_size

log = logging.getLogger(__name__)


class Downscaled(nn.Module):  # type: ignore[misc]
    """A module with a downscale behind it, in its place: other attributes are those of the module."""

    def __init__(self, module: nn.Module, downscale: Downscale) -> None:
        super().__init__()
        self.module = module
        self.downscale = downscale

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the module's feature map, reduced."""
        return self.downscale(self.module(*args, **kwargs))  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped module's attribute: networks read the weights and strides of their own layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", "downscale") or "_modules" not in self.__dict__:
                raise
            return getattr(self.module, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """What a named module returns at the native resolution."""

    name: str
    channels: int
    size: Size

    def reduced(self, resolution: Size, native: Size) -> Size:
        """Return the size of this map in a network that sees images of `resolution` in place of `native`."""
        height, width = (max(1, round(side * new / old)) for side, new, old in zip(self.size, resolution, native))
        return min(height, self.size[0]), min(width, self.size[1])

    def snapped(self, resolution: Size, native: Size) -> Size:
        """Return the resolution nearest to the one asked for that gives whole pixels in this map."""
        height, width = (
            max(1, round(old * new / side))
            for side, new, old in zip(self.size, self.reduced(resolution, native), native)
        )
        return height, width


def feature_map(module: nn.Module, spec: ModelSpec, name: str) -> FeatureMap:
    """Return what the module `name` puts out at the native resolution.

    Raises:
        Unsupported: it is not executed, or its output is no feature map (N, C, H, W) in the image's proportions.
    """
    found: list[Any] = []
    with _watched(module.get_submodule(name), lambda _, output: found.append(output)):
        run(module, spec, spec.native_resolution)
    if not found:
        raise Unsupported(f"{name} is not executed")
    return _described(name, found[0], spec)


def _described(name: str, output: Any, spec: ModelSpec) -> FeatureMap:
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
    height, width = spec.native_resolution
    if (
        shape is None
        or len(shape) != 4
        or min(shape) < 1
        or abs(shape[2] * width - shape[3] * height) > max(height, width)
    ):
        said = f"of shape {shape}" if shape else f"a {type(output).__name__}"
        raise Unsupported(f"the output of {name} is {said}, which is no feature map (N, C, H, W) to scale down")
    return FeatureMap(name=name, channels=shape[1], size=(shape[2], shape[3]))


def first_convolution(module: nn.Module, spec: ModelSpec) -> str | None:
    """Return the name of the first convolution that is executed and whose input depends on the image, or None."""
    names = {inner: name for name, inner in module.named_modules() if isinstance(inner, nn.Conv2d) and name}
    seen: list[list[tuple[nn.Module, torch.Tensor]]] = []
    for image in (torch.zeros, torch.ones):
        order: list[tuple[nn.Module, torch.Tensor]] = []
        handles = [
            inner.register_forward_pre_hook(
                lambda inner, args, named, order=order: order.append((inner, (*args, *named.values())[0])),
                with_kwargs=True,
            )
            for inner in names
        ]
        try:
            run(module, spec, spec.native_resolution, image=image)
        finally:
            for handle in handles:
                handle.remove()
        seen.append(order)
    for (convolution, one), (_, other) in zip(*seen):
        if not torch.equal(one, other):
            return str(names[convolution])
    return None


@contextmanager
def _watched(module: nn.Module, see: Callable[[Any, Any], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, inputs, output: see(inputs, output))
    try:
        yield
    finally:
        handle.remove()


def reduce_behind(
    module: nn.Module, spec: ModelSpec, name: str, resolution: Size, *, positions: bool = True
) -> nn.Module:
    """Return a copy whose map behind the module `name` is as large as an image of `resolution` would make it.

    Position embeddings behind the place are resampled, as they are for smaller images, where the network needs it (and
    with `positions`).

    Raises:
        Unsupported: it puts out no feature map, or what comes after it cannot take a smaller one.
    """
    found = feature_map(module, spec, name)
    target = found.reduced(resolution, spec.native_resolution)
    reduced = _insert(module, found, target)
    reason = _refused(module, reduced, spec)
    if reason is not None and positions:
        with contextlib.suppress(Unsupported):
            resampled = _with_positions_for(module, spec, resolution)
            if _same_at(name, module, resampled, spec):
                reduced = _insert(resampled, found, target)
                reason = _refused(module, reduced, spec) and reason
    if reason is None:
        return reduced
    raise Unsupported(f"behind {name}: {reason}")


def _with_positions_for(module: nn.Module, spec: ModelSpec, resolution: Size) -> nn.Module:
    """Return a copy whose positions are those of images of `resolution`, which takes images of its native size all the same."""
    reduced = resized.apply(module, spec, resolution, resized.Options())
    for part in reduced.modules():
        if hasattr(part, "strict_img_size"):  # by which timm's patch embeddings compare the image with their own size
            part.strict_img_size = False
    return reduced


def _same_at(name: str, module: nn.Module, other: nn.Module, spec: ModelSpec) -> bool:
    """Whether both put out the same behind the module `name`: what comes before it must see its own positions."""
    found: list[Any] = []
    for one in (module, other):
        with _watched(one.get_submodule(name), lambda _, output: found.append(output)):
            try:
                run(one, spec, spec.native_resolution, image=_ramp)
            except Exception as error:  # noqa: BLE001 - what comes behind need not take the native size any more
                log.debug("behind %s: %s", name, error)
    return len(found) == 2 and torch.equal(found[0], found[1])


def _ramp(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(0, 1, math.prod(shape), dtype=dtype).reshape(shape)


def _insert(module: nn.Module, found: FeatureMap, target: Size) -> nn.Module:
    copied = copy.deepcopy(module)
    inner = copied.get_submodule(found.name)
    holders = [(part, key) for part in copied.modules() for key, held in part._modules.items() if held is inner]
    downscale = Downscale(found.channels, found.size, target)
    like = next((p for p in inner.parameters() if p.is_floating_point()), None)
    if like is not None:
        downscale.to(device=like.device, dtype=like.dtype)
    wrapped = Downscaled(inner, downscale)
    wrapped.train(inner.training)
    for part, key in holders:  # a network may know its layer under two names
        part._modules[key] = wrapped
    return copied


def _refused(module: nn.Module, reduced: nn.Module, spec: ModelSpec) -> str | None:
    """Return why the reduced copy does not answer as the module does, or None: both ran once."""
    reached: list[nn.Module] = []
    inserted = [part for part in reduced.modules() if isinstance(part, Downscaled)]
    handles = [part.register_forward_pre_hook(lambda part, _: reached.append(part)) for part in inserted]
    try:
        output = run(reduced, spec, spec.native_resolution)
    except Exception as error:  # noqa: BLE001 - whatever a network raises at a foreign size is the reason we ask for
        return f"what comes after it cannot take a smaller map: {reason_of(error)}"
    finally:
        for handle in handles:
            handle.remove()
    if {id(part) for part in inserted} - {id(part) for part in reached}:
        return "the network does not reach this module by its name, so that nothing can be put in its place"
    native = run(module, spec, spec.native_resolution)
    shapes = [getattr(one, "shape", None) for one in (native, output)]
    if shapes[0] is not None and shapes[0] != shapes[1] and len(shapes[0]) <= 2:
        return f"its output becomes {tuple(shapes[1] or ())} instead of {tuple(shapes[0])}"
    return None


def run(
    module: nn.Module, spec: ModelSpec, resolution: Size, *, image: Callable[..., torch.Tensor] = torch.zeros
) -> Any:
    """Run the module once on a picture of one colour."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        return module(image(1, spec.channels, *resolution, dtype=dtype))


def no_modules(module: nn.Module) -> str | None:
    """Return why nothing can be put into this network, where it is a graph rather than modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript archive has no modules to put a downscale between: give the original module"
    if isinstance(module, torch.fx.GraphModule):
        return "a graph of torch.export has no modules to put a downscale between: give the original module"
    return None


def larger(resolution: Size, native: Size) -> str | None:
    """Return that a place inside the network cannot enlarge."""
    if any(side > old for side, old in zip(resolution, native)):
        return f"{format_size(resolution)} is larger than the {format_size(native)} that the network sees"
    return None
