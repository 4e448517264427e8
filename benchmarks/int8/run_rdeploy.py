"""Runs rdeploy as the peers are run: one ONNX file, one scheme, 8-bit weights whatever this CPU has.

python run_rdeploy.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG     CONFIG: "affine auto", "symmetric thorough", ...
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

from rows import Clock, Rows

from rdeploy import __version__, backends, targets
from rdeploy.quantize import recipe
from rdeploy.types import QuantOptions

SCHEMES = {"affine": "onnxruntime", "symmetric": "tensorrt_rtx"}

source, calibration, out, config = sys.argv[1:5]
kind, chosen = config.split()
scheme = dataclasses.replace(backends.find(SCHEMES[kind]).scheme(targets.load("cpu")), weight_max=127)
clock = Clock()
with tempfile.TemporaryDirectory(prefix="rdeploy-compare-") as folder:
    images = Rows(calibration)
    seen = recipe.calibrate(Path(source), Path(folder), schemes=[scheme], images=images, recipe=chosen)
    made = recipe.quantize(seen, Path(out), scheme=scheme, images=images, options=QuantOptions())
clock.answer(__version__, said=list(made.recipe))
