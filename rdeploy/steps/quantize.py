"""Quantize a variant: from its FP32 graph and images to the INT8 graph of each scheme, layers in float where asked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import serde
from rdeploy.data import pairs
from rdeploy.data.calibration import NormalisedImages
from rdeploy.data.images import ImageSet
from rdeploy.results import Quantization
from rdeploy.steps import Steps
from rdeploy.steps.made import Exported, Quantized, describe, described, read_quantized, resolution_of, versions
from rdeploy.types import ModelSpec, QuantOptions, QuantScheme

if TYPE_CHECKING:
    from rdeploy.quantize import mixed


def quantized(
    steps: Steps,
    exported: Exported,
    schemes: Sequence[QuantScheme],
    images: ImageSet,
    spec: ModelSpec,
    options: QuantOptions,
    labelled: ImageSet | None = None,
    void: Sequence[int] = (),
) -> dict[str, Quantized]:
    """Return the INT8 graph for each scheme, by the scheme's name; all from one pass over the images.

    With `options.max_drop` layers fall back to float until it holds, judged on `labelled` or else on `images`.
    """
    pixels = steps.pixels(images, resolution_of(exported.onnx), spec)

    from rdeploy.quantize import families

    schemes = [families.scheme_for(options.recipe, scheme) for scheme in schemes]

    def write(folder: Path) -> None:
        from rdeploy.quantize import judge, mixed, recipe

        every, source = NormalisedImages(pixels, spec), Path(exported.onnx.path)
        with tempfile.TemporaryDirectory(prefix="rdeploy-calibrate-") as work:
            with steps.stage("calibrate", f"{len(images)} images"):
                name = options.recipe
                seen = recipe.calibrate(source, Path(work), schemes=schemes, images=every, recipe=name)
            weights: judge.Weights = {}
            done: dict[str, Quantization] = {}
            chosen: dict[str, recipe.Pinned] = {}
            for scheme in schemes:
                out, before = folder / f"{scheme.name}.onnx", done.get(scheme.activations)
                # What suits one runtime's unsigned activations suits the other's.
                pinned = chosen.setdefault(scheme.activations, recipe.Pinned())

                def requantize(
                    keep_float: tuple[str, ...],
                    out: Path = out,
                    scheme: QuantScheme = scheme,
                    pinned: recipe.Pinned = pinned,
                ) -> Quantization:
                    more = replace(options, keep_float=(*options.keep_float, *keep_float))
                    with steps.stage(
                        "quantize", scheme.name + f", {len(keep_float)} layers in float" * bool(keep_float)
                    ):
                        return recipe.quantize(
                            seen, out, scheme=scheme, images=every, options=more, weights=weights, pinned=pinned
                        )

                if options.max_drop is None:
                    made = requantize(())
                else:
                    made = mixed.control(
                        source,
                        out,
                        scheme=scheme,
                        images=every,
                        requantize=requantize,
                        judge=_judge(steps, source, images, labelled, spec, void),
                        max_drop=options.max_drop,
                        first=before.fallbacks.layers if before and before.fallbacks else (),
                    )
                done[scheme.activations] = made = replace(made, images_sha256=images.sha256)
                describe(out, "int8", {"quantization": serde.to_json(made), "scheme": serde.to_json(scheme)})

    judges = [labelled.sha256, labelled.labels, list(void)] if labelled and options.max_drop is not None else []
    facts = [exported.onnx.sha256, images.sha256, spec.preprocessing, schemes, options, judges, versions()]
    folder = steps.store.make("quantize", serde.digest(facts), write)
    return {scheme.name: read_quantized(folder / f"{scheme.name}.onnx") for scheme in schemes}


def _judge(
    steps: Steps, fp32: Path, images: ImageSet, labelled: ImageSet | None, spec: ModelSpec, void: Sequence[int]
) -> mixed.Judge:
    from rdeploy.quantize import mixed

    judges = labelled or images
    resolution = resolution_of(described(fp32)[0])
    batches = NormalisedImages(steps.pixels(judges, resolution, spec), spec)
    labels, masks = (labelled.labels, labelled.masks) if labelled else (None, None)

    def counts(index: int, scores: NDArray[Any]) -> NDArray[np.int64]:
        assert masks is not None
        return pairs.counts(scores, masks[index], resolution, spec.preprocessing, void)

    with steps.stage("quantize", f"decisions on {len(judges)} images"):
        return mixed.judge_on(fp32, batches, labels=labels, counts=counts if masks else None, task=spec.task)
