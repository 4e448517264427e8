"""Runs in AIMET's own environment: `QuantizationSimModel`, weights per channel, exported with Q/DQ pairs.

python run_aimet.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG     CONFIG: "u8 tf_enhanced", "s8 CLE+min_max", "u8 adaround", ...

"adaround" runs 1,000 iterations a layer on 32 images, with cross-layer equalization before it.
"""

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import onnx
from aimet_onnx.common.quantsim_config import quantsim_config
from aimet_onnx.cross_layer_equalization import equalize_model
from aimet_onnx.quantsim import QuantizationSimModel
from rows import Clock, Rows

source, calibration, out, config = sys.argv[1:5]
kind, method = config.split()
images = Rows(calibration)
model = onnx.load(source)
name = model.graph.input[0].name
rows = [{name: images[i]} for i in range(len(images))]
rules = json.loads((Path(quantsim_config.__file__).parent / "default_config.json").read_text())
rules["defaults"]["per_channel_quantization"] = "True"
rules["defaults"]["ops"]["is_symmetric"] = str(kind == "s8")
clock = Clock()
with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    json.dump(rules, file)
    file.flush()
    if method.startswith("CLE") or method == "adaround":
        equalize_model(model)
    scheme = "tf_enhanced" if method == "adaround" else method.removeprefix("CLE+")
    sim = QuantizationSimModel(model, quant_scheme=scheme, config_file=file.name, providers=["CPUExecutionProvider"])
if method == "adaround":
    from aimet_onnx.adaround.adaround_weight import Adaround

    Adaround.apply_adaround(sim, rows[:32], num_iterations=1000)
sim.compute_encodings(rows)
quantized = sim.to_onnx_qdq(force_activation_as="signed" if kind == "s8" else "unsigned")
onnx.save(quantized, out)
clock.answer(importlib.metadata.version("aimet-onnx"))
