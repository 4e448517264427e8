"""Export a variant: from the module or an ONNX file to the FP32 graph at its resolution, compared with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rdeploy import backends, resize, serde
from rdeploy.data.calibration import NormalisedImages
from rdeploy.data.images import ImageSet
from rdeploy.errors import Unsupported
from rdeploy.steps import Steps
from rdeploy.steps.made import Exported, describe, described, versions
from rdeploy.steps.model import LazyModel
from rdeploy.types import OnnxModel, Target, Variant, format_size

PARITY_IMAGES = 8
_CHANGES_MAPS = ("stem", "after", "patch")
"""Places behind which a network's maps have fewer cells for the same image."""


def exported(steps: Steps, model: LazyModel, variant: Variant, images: ImageSet) -> Exported:
    """Return a variant's FP32 graph, compared with PyTorch on real images; dense outputs have the native size."""
    size = model.spec.native_resolution
    places = resize.places_of(variant, size)
    dense = model.spec.task != "classification"
    native = exported(steps, model, Variant(resolution=size), images).onnx if places and dense else None
    pixels = steps.pixels(images, variant.resolution, model.spec)

    def write(folder: Path) -> None:
        from rdeploy import export

        export.check_graph(_export(steps, model, variant, folder / "model.onnx"))
        parity = _parity(steps, model, variant, folder / "model.onnx", pixels)
        if native is not None:
            export.restore_size(folder / "model.onnx", native)
        if native is not None and model.spec.task == "detection":
            inside = [place.at for place in places if place.method in _CHANGES_MAPS]
            export.restore_boxes(folder / "model.onnx", size, variant.resolution, inside=inside)
        describe(folder / "model.onnx", "fp32", {"parity": parity})

    dynamic = [steps.target.opset, steps.dynamic_batch, *(["program"] if _keeps_program(steps.target) else [])]
    weights = [variant.weights] if variant.weights else []
    facts = [model.spec.sha256, size, variant.resolution, places, weights, dynamic, images.sha256, versions()]
    folder = steps.store.make("export", serde.digest(facts), write)
    onnx, cost, more = described(folder / "model.onnx")
    return Exported(onnx=onnx, cost=cost, parity=more["parity"])


def _keeps_program(target: Target) -> bool:
    """Whether a backend of the target runs the module itself, as PyTorch exports it."""
    return any(getattr(backends.find(name), "NEEDS_MODULE", False) for name in target.backends)


def _export(steps: Steps, model: LazyModel, variant: Variant, path: Path) -> OnnxModel:
    from rdeploy import export

    resolution = variant.resolution
    with steps.stage("export", variant.id):
        opset, dynamic = steps.target.opset, steps.dynamic_batch
        if model.onnx is not None:
            found = export.prepare(model.onnx, resolution, path, opset=opset, dynamic_batch=dynamic)
            check_runs(found, model.onnx.name)
            return found
        module = module_of(steps, model, variant)
        if _keeps_program(steps.target):
            export.save_program(module, model.spec, resolution, path.with_suffix(".pt2"), dynamic_batch=dynamic)
        return export.export(module, model.spec, resolution, path, opset=opset, dynamic_batch=dynamic)


def check_runs(graph: OnnxModel, name: str) -> None:
    """Run a graph that was made from an ONNX file once: what a re-sizing missed must not become a wrong engine.

    Raises:
        Unsupported: it does not run, or returns other shapes than it declares.
    """
    from rdeploy.quantize.ranges import activations

    size = format_size((graph.inputs[0].shape[2], graph.inputs[0].shape[3]))
    image = np.zeros((1, *graph.inputs[0].shape[1:]), np.float32)
    try:
        found = next(iter(activations(Path(graph.path), [info.name for info in graph.outputs], [image])))
    except Exception as error:  # whatever the runtime raises is the reason
        said = " ".join(str(error).split())
        raise Unsupported(f"{name} does not run at {size}: {said[:300]}", stage="export") from error
    wrong = [
        info.name for info in graph.outputs if -1 not in info.shape[1:] and found[info.name].shape[1:] != info.shape[1:]
    ]
    if wrong:
        raise Unsupported(
            f"{name} cannot be re-sized to {size}: its output {wrong[0]} has another shape than its layers give it"
        )


def module_of(steps: Steps, model: LazyModel, variant: Variant) -> Any:
    """Return a variant's module, with its adapted weights where it has any; it belongs to the model, leave it as it is."""
    weights = steps.store.root / "adapt" / variant.weights / "weights.pt" if variant.weights else None
    return model.resized(resize.places_of(variant, model.spec.native_resolution), weights)


def _parity(steps: Steps, model: LazyModel, variant: Variant, path: Path, pixels: Path) -> float:
    if model.onnx is not None:
        return 0.0
    from rdeploy import export
    from rdeploy.quantize.ranges import activations

    with steps.stage("export", "compare with PyTorch"):
        batch = NormalisedImages(pixels, model.spec)[:PARITY_IMAGES]
        exact = export.torch_outputs(module_of(steps, model, variant), batch)
        names = [value.name for value in export.describe(path, precision="fp32").outputs]
        found = list(activations(path, names, batch))
        rows = (np.concatenate([values[name] for values in found]) for name in names)
        return max(export.check_parity(*pair) for pair in zip(exact, rows, strict=True))
