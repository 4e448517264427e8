"""Runs in NNCF's own environment: `nncf.quantize_with_accuracy_control` on an ONNX file, judged by the decisions of FP32.

python peer_nncf_control.py MODEL.onnx IMAGES.npy DECISIONS.npy OUT.xml MAX_DROP [--transformer]

IMAGES: float32 (N, C, H, W) to calibrate and to judge on; DECISIONS: what FP32 decides on each. MAX_DROP: a share, 0.01 is one
point. Prints JSON: version, seconds, peak_bytes, calls and images evaluated, layers left in float.
"""

import json
import sys
import time

import nncf
import numpy as np
import openvino as ov
from peak import peak_bytes
from rows import Rows, features

source, images_file, decisions_file, out, max_drop = sys.argv[1:6]
images, decisions = Rows(images_file), np.load(decisions_file)
model = ov.Core().read_model(source)
kind = nncf.ModelType.TRANSFORMER if "--transformer" in sys.argv else None
evaluated = {"calls": 0, "images": 0}


class Pairs:
    """Images with their decisions, each read when it is asked for."""

    def __len__(self):
        return len(images)

    def __getitem__(self, index):
        return images[index], int(decisions[index])


def agreement(compiled, data):
    """Return the share of images that are decided as FP32 does, and whether each is."""
    evaluated["calls"] += 1
    same = []
    for image, decision in data:
        same.append(float(features(next(iter(compiled(image).values()))).argmax() == decision))
    evaluated["images"] += len(same)
    return float(np.mean(same)), same


def holds_integers(value):
    """Whether a layer's weights are rounded: behind a FakeQuantize, or stored as integers; None where they are no constants."""
    rounded = False
    while True:
        node = value.get_node()
        kind = node.get_type_name()
        rounded |= kind == "FakeQuantize"
        if kind == "Constant":
            return rounded or node.get_element_type().get_type_name() in ("i8", "u8", "i4", "u4")
        if kind not in ("FakeQuantize", "Convert", "Reshape", "Transpose", "Subtract", "Multiply"):
            return None
        value = node.input_value(0)


def float_layers(graph):
    """Return the names of the layers with constant weights that are not rounded."""
    layers = [
        node
        for node in graph.get_ordered_ops()
        if node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
    ]
    return {node.get_friendly_name() for node in layers if holds_integers(node.input_value(1)) is False}


def calibration():
    return nncf.Dataset(Pairs(), lambda pair: pair[0])


before = float_layers(nncf.quantize(model, calibration(), model_type=kind, subset_size=len(images)))
start = time.perf_counter()
controlled = nncf.quantize_with_accuracy_control(
    model,
    calibration_dataset=calibration(),
    validation_dataset=nncf.Dataset(Pairs()),
    validation_fn=agreement,
    max_drop=float(max_drop),
    drop_type=nncf.DropType.ABSOLUTE,
    model_type=kind,
    subset_size=len(images),
)
seconds = time.perf_counter() - start
ov.save_model(controlled, out, compress_to_fp16=False)
facts = {
    "version": nncf.__version__, "seconds": seconds, "peak_bytes": peak_bytes(),
    "calls": evaluated["calls"], "images": evaluated["images"], "fallbacks": len(float_layers(controlled) - before),
}  # fmt: skip
print(json.dumps(facts))
