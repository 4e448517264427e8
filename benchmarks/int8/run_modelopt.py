"""Runs in Model-Optimizer's own environment: `modelopt.onnx.quantization.quantize`, INT8, the rest in FP32.

python run_modelopt.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG     CONFIG: "max" or "entropy"
"""

import importlib.metadata
import sys

import numpy as np
from modelopt.onnx import quantization
from rows import Clock

source, calibration, out, config = sys.argv[1:5]
clock = Clock()
quantization.quantize(
    source, quantize_mode="int8", calibration_data=np.load(calibration), calibration_method=config, calibration_eps=["cpu"],
    high_precision_dtype="fp32", output_path=out,
)  # fmt: skip
clock.answer(importlib.metadata.version("nvidia-modelopt"))
