"""Settle where and how far a model is reduced: the variant nearest to the one asked for that it can take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rdeploy import resize, serde
from rdeploy.data.calibration import NormalisedImages
from rdeploy.data.images import ImageSet
from rdeploy.errors import Unsupported
from rdeploy.steps import Steps
from rdeploy.steps.made import versions
from rdeploy.steps.model import LazyModel
from rdeploy.types import Variant, format_size


def settled(steps: Steps, model: LazyModel, variant: Variant, images: ImageSet | None) -> Variant:
    """Return the variant nearest to the one asked for that the model can take, its methods' options searched on images.

    Raises:
        Unsupported: the model cannot be reduced at one of the places.
    """
    native = model.spec.native_resolution
    places = resize.places_of(variant, native)
    if model.onnx is not None:
        if inside := [place.at for place in places if place.at != resize.INPUT]:
            raise Unsupported(f"an ONNX file is reduced at its input only: give the PyTorch model for {inside[0]}")
        return variant
    found: tuple[resize.Place, ...] = ()
    for place in places:
        found += (_settled(steps, model, found, place, images),)
    return resize.variant_of(variant, found, native)


def _settled(
    steps: Steps, model: LazyModel, before: tuple[resize.Place, ...], place: resize.Place, images: ImageSet | None
) -> resize.Place:
    spec = model.spec
    for earlier in before:
        spec = resize.after_place(spec, earlier)
    searches = images is not None and hasattr(resize.find(place.method), "fit")
    judged = images if searches else None

    def write(folder: Path) -> None:
        pixels = None if judged is None else steps.pixels(judged, spec.native_resolution, spec)
        with steps.stage("resize", f"{place.at} {format_size(place.resolution)}"):
            pictures = None if pixels is None else NormalisedImages(pixels, spec)
            answer: dict[str, Any] = {"place": None, "reason": None}
            try:
                answer["place"] = resize.settle(model.resized(before), spec, place, pictures)
            except Unsupported as error:
                answer["reason"] = str(error)
        (folder / "place.json").write_text(serde.dumps(answer))

    facts = [model.spec.sha256, model.spec.native_resolution, before, place, versions()]
    seen = [judged.sha256, spec.preprocessing] if judged is not None else []
    found = json.loads(
        (steps.store.make("resolution", serde.digest([*facts, *seen]), write) / "place.json").read_text()
    )
    if found["reason"]:
        raise Unsupported(found["reason"])
    return serde.from_json(resize.Place, found["place"], where="place.json")
