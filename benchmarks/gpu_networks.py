"""The networks of the GPU check: seeded random weights, which is all that speed needs, as modules and as ONNX graphs.

As a program: a JSON job {network, size, folder} on stdin; where in that folder its graphs and references are, as one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

NETWORKS = {"resnet50": "resnet50", "efficientnet": "efficientnet_b0", "vit_s16": "vit_small_patch16_224"}
SIZES = (224, 168)
OPSET = 17
_IMAGES = 8


def module(network: str, size: int) -> tuple[Any, int]:
    """Return the module at the size nearest to the one asked for that it can take, and that size."""
    import timm
    import torch

    from rdeploy import resize
    from rdeploy.plugins import make_options
    from rdeploy.types import ModelSpec, Preprocessing

    torch.manual_seed(0)
    made = timm.create_model(NETWORKS[network], pretrained=False).eval()
    if size == 224:
        return made, size
    spec = ModelSpec(
        name=network, source=f"timm:{network}", sha256="", native_resolution=(224, 224),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
    )  # fmt: skip
    method = resize.find("input")
    snapped = method.snap(made, spec, (size, size))
    options = make_options(method.Options, {}, where="gpu_networks")
    return method.apply(made, spec, snapped, options), snapped[0]


def graphs(network: str, size: int, folder: Path) -> dict[str, Any]:
    """Write the FP32, FP16 and INT8 graphs and the reference outputs; return {size, fp32, fp16, int8, reference...}.

    All paths are relative to `folder`, which may travel.
    """
    import onnx_ir as ir

    from rdeploy import backends, export
    from rdeploy.graph import fp16
    from rdeploy.quantize import recipe
    from rdeploy.types import ModelSpec, Preprocessing, QuantOptions, Target

    place = folder / f"{network}-{size}"
    place.mkdir(parents=True, exist_ok=True)
    made, actual = module(network, size)
    spec = ModelSpec(
        name=network, source=network, sha256="", native_resolution=(actual, actual),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
    )  # fmt: skip
    export.export(made, spec, (actual, actual), place / "fp32.onnx", opset=OPSET, dynamic_batch=True)
    half = ir.load(place / "fp32.onnx")
    fp16.convert(half)
    ir.save(half, place / "fp16.onnx")
    rng = np.random.default_rng(1)
    seen = [rng.standard_normal((1, 3, actual, actual), dtype=np.float32) for _ in range(_IMAGES)]
    scheme = backends.find("tensorrt").scheme(Target(name="gpu-check"))
    calibration = recipe.calibrate(place / "fp32.onnx", place, schemes=[scheme], images=seen, recipe="fast")
    recipe.quantize(
        calibration, place / "int8.onnx", scheme=scheme, images=seen,
        options=QuantOptions(calibrator="minmax", samples=_IMAGES),
    )  # fmt: skip
    files = {precision: place / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    exact, integers = (_reference(files[precision], actual) for precision in ("fp32", "int8"))
    files |= {"reference_fp32": exact, "reference_fp16": exact, "reference_int8": integers}
    return {"size": actual, **{name: path.relative_to(folder).as_posix() for name, path in files.items()}}


def _reference(onnx: Path, size: int) -> Path:
    """Execute a graph on the CPU, INT8 in float, on the first image that the rows are measured with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    path = onnx.with_suffix(".npy")
    np.save(path, session.run(None, {session.get_inputs()[0].name: pixels})[0])
    return path


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(graphs(asked["network"], asked["size"], Path(asked["folder"]))))
