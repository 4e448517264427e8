"""Runs in Neural Compressor's own environment: its post-training static quantization of ONNX files (2.x; 3.x dropped it).

python run_inc.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG     CONFIG: "u8 minmax", "s8 kl", "u8 smooth", ...
"""

import importlib.metadata
import sys

import onnx
from neural_compressor import PostTrainingQuantConfig, quantization
from rows import Clock, Rows

source, calibration, out, config = sys.argv[1:5]
kind, method = config.split()
images = Rows(calibration)


class Loader:
    batch_size = 1

    def __iter__(self):
        return ((images[i], 0) for i in range(len(images)))


activation = {
    "dtype": ["int8" if kind == "s8" else "uint8"],
    "scheme": ["sym" if kind == "s8" else "asym"],
    "algorithm": ["minmax" if method == "smooth" else method],
}
weight = {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"], "algorithm": ["minmax"]}
clock = Clock()
wanted = PostTrainingQuantConfig(
    approach="static", quant_format="QDQ", calibration_sampling_size=[len(images)], quant_level=1,
    op_type_dict={".*": {"activation": activation, "weight": weight}},
    recipes={"smooth_quant": True} if method == "smooth" else {},
)  # fmt: skip
quantized = quantization.fit(onnx.load(source), wanted, calib_dataloader=Loader())
if quantized is None:
    sys.exit("neural_compressor returned no model")
quantized.save(out)
clock.answer(importlib.metadata.version("neural_compressor"))
