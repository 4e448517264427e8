"""Every kind of graph that is made for the TensorRT family is parsed and built by TensorRT-RTX, and passes every pre-flight.

Every place of a classifier in FP32, FP16, INT8 with a rest of either kind, mixed precision and with the preprocessing inside;
every other task in FP32 and in what a build for TensorRT makes of INT8.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnx_ir", reason="graphs are made with onnx-ir: pip install 'rdeploy[torch]'")

from torch import nn  # noqa: E402

from rdeploy import capabilities, resize  # noqa: E402
from rdeploy.backends import tensorrt_rtx  # noqa: E402
from rdeploy.data.images import ImageSet  # noqa: E402
from rdeploy.graph import lower, needs  # noqa: E402
from rdeploy.models import Loaded  # noqa: E402
from rdeploy.steps import Steps, export, quantize, rewrite  # noqa: E402
from rdeploy.steps.model import LazyModel  # noqa: E402
from rdeploy.store import Store  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing, QuantOptions, Target, Variant  # noqa: E402

NATIVE, HALF = (64, 64), (32, 32)
TARGET = Target(
    name="rtx",
    backends=("tensorrt_rtx",),
    compute_capabilities=("sm_89",),
    opset=17,
    precisions=("fp32", "fp16", "int8"),
)
OPTIONS = tensorrt_rtx.Options(optimization_level=0)

needs_rtx = pytest.mark.skipif(tensorrt_rtx.unavailable() is not None, reason=str(tensorrt_rtx.unavailable()))


def body():
    return [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Embedder(nn.Sequential):
    def __init__(self):
        super().__init__(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(*body()), nn.Conv2d(8, 3, 1)

    def forward(self, images):
        return nn.functional.interpolate(self.head(self.body(images)), size=images.shape[-2:], mode="bilinear")


class Detector(nn.Module):
    """(N, 4 + 2, A) as YOLOv8's raw output: centres and sizes in pixels, then the scores of two classes."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(*body()), nn.Conv2d(8, 6, 1)

    def forward(self, images):
        found = self.head(self.body(images))
        return torch.cat([found[:, :4].sigmoid() * 8, found[:, 4:].sigmoid()], dim=1).flatten(2)


def transformer(classes=5):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    shape = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **shape)


def vectors():
    return transformer(classes=0)


CASES = [
    ("classification", Classifier, "input"),
    ("classification", Classifier, "stem"),
    ("classification", Classifier, "after:2"),
    ("classification", transformer, "input"),
    ("classification", transformer, "patch"),
    ("classification", transformer, "tokens"),
    ("classification", Classifier, "input@0.75+stem@0.5"),
    ("classification", transformer, "input@0.75+tokens@0.75"),
    ("classification", transformer, "patch@0.5+tokens@0.75"),
    ("segmentation", Segmenter, "input"),
    ("segmentation", Segmenter, "after:body.2"),
    ("detection", Detector, "input"),
    ("embedding", Embedder, "input"),
    ("embedding", vectors, "tokens"),
]


def made_graphs(folder, task, factory, at):
    """Yield the name of every kind of graph of a variant, and the graph, as a build makes them."""
    torch.manual_seed(0)
    module = factory().eval()
    spec = ModelSpec(
        name="net", source="net", sha256=f"{task}{at}", native_resolution=NATIVE, task=task,
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, crop_mode="squash"),
    )  # fmt: skip
    steps = Steps(target=TARGET, store=Store(folder / "store"), progress=lambda text: None)
    model = LazyModel(spec, None, lambda: Loaded(spec=spec, module=module))
    array = np.random.default_rng(0).integers(0, 256, (4, *NATIVE, 3), np.uint8)
    images = ImageSet(
        paths=("a", "b", "c", "d"), labels=None, class_names=(), sha256="images", array=array, rows=(0, 1, 2, 3)
    )
    plain = Variant(resolution=NATIVE)
    places: tuple[resize.Place, ...] = ()
    given = spec
    for place in resize.asked(at, NATIVE, resolution=HALF):  # each counts from what the places before it have left
        places += (resize.settle(model.resized(places), given, place, None),)
        given = resize.after_place(given, places[-1])
    variant = resize.variant_of(plain, places, NATIVE)
    exported = export.exported(steps, model, variant, images)
    scheme = tensorrt_rtx.scheme(TARGET)

    def int8(**more):
        options = QuantOptions(recipe="fast", calibrator="minmax", samples=4, **more)
        return quantize.quantized(steps, exported, [scheme], images, spec, options)[scheme.name]

    def half(graph):
        return rewrite.rounded(steps, graph, images, spec).onnx

    quantized = int8().onnx
    rest_fp16 = half(quantized)
    yield "fp32", exported.onnx
    yield "int8, the rest fp16", rest_fp16
    if task == "classification":
        operators = dict(needs.read(Path(quantized.path)).operators)
        layers = operators.get("Conv") or operators["MatMul"]
        yield "int8", quantized
        yield "fp16", half(exported.onnx)
        yield "mixed", half(int8(keep_float=layers[:1]).onnx)
        yield "fp32, preprocessing inside", rewrite.embedded(steps, exported.onnx, spec).onnx
        yield "int8, the rest fp16, preprocessing inside", rewrite.embedded(steps, rest_fp16, spec).onnx


def obstacles(path, entry):
    """What is in the way of a graph at one release line, after what it lacks was written otherwise, as a build does.

    INT8 beside FP16 takes opset 19; where that is not read, INT8 has an FP32 rest (`expectations.mixes_int8_with_fp16`).
    """
    found = needs.read(path)
    if {"int8", "fp16"} <= set(found.precisions) and entry.opset < 19:
        return ()
    ways = lower.lowerable(entry.lacks)
    kept = tuple((operator, places) for operator, places in found.operators if operator not in ways)
    return capabilities.obstacles(dataclasses.replace(found, operators=kept), entry, Target(name="any"))


@needs_rtx
@pytest.mark.parametrize(("task", "factory", "at"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_every_graph_is_built(tmp_path, task, factory, at):
    executed = {}
    for name, graph in made_graphs(tmp_path, task, factory, at):
        for entry in capabilities.table():
            assert obstacles(Path(graph.path), entry) == (), f"{name}, {entry.title}"
        engine = tensorrt_rtx.build_engine(Path(graph.path), tmp_path / name, target=TARGET, options=OPTIONS)
        executed[name] = dict(engine.executed_precision)

    for name, precisions in executed.items():
        assert ("int8" in precisions) == name.startswith(("int8", "mixed")), name
    if task == "classification":
        assert executed["fp16"]["fp16"] > 0
    if factory is Classifier:  # the first layer of a transformer stays in float by itself
        assert executed["int8"]["int8"] > executed["mixed"]["int8"]
