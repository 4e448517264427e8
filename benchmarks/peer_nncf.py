"""Runs in NNCF's own environment: quantize an ONNX file with `nncf.quantize` and save OpenVINO's IR.

python peer_nncf.py MODEL.onnx CALIBRATION.npy OUT.xml [--transformer]     CALIBRATION: float32 (N, C, H, W)
"""

import sys
import time
from pathlib import Path

import nncf
import numpy as np
import openvino as ov

sys.path.append(str(Path(__file__).parent / "int8"))

from peak import peak_bytes

source, calibration, out = sys.argv[1:4]
images = np.load(calibration, mmap_mode="r")
model = ov.Core().read_model(source)
start = time.perf_counter()
kind = nncf.ModelType.TRANSFORMER if "--transformer" in sys.argv else None
quantized = nncf.quantize(
    model,
    nncf.Dataset([np.asarray(images[i : i + 1]) for i in range(len(images))]),
    model_type=kind,
    subset_size=len(images),
)
seconds = time.perf_counter() - start
ov.save_model(quantized, out, compress_to_fp16=False)
print(f"{nncf.__version__} {seconds:.1f} {peak_bytes()}")
