"""Runs in NNCF's own environment: `nncf.quantize` on an ONNX file, all weights with 8 bits.

python run_nncf.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG [--transformer]     CONFIG: "mixed", "mixed accurate", ...

"mixed" has affine activations, "performance" symmetric ones; "accurate" is its slow bias correction in place of the fast one.
"""

import sys

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from rows import Clock, Rows

source, calibration, out, config = sys.argv[1:5]
images = Rows(calibration)
model = onnx.load(source)
name = model.graph.input[0].name
clock = Clock()
quantized = nncf.quantize(
    model,
    nncf.Dataset(range(len(images)), lambda i: {name: images[i]}),
    preset=nncf.QuantizationPreset.MIXED if "mixed" in config else nncf.QuantizationPreset.PERFORMANCE,
    model_type=nncf.ModelType.TRANSFORMER if "--transformer" in sys.argv else None,
    fast_bias_correction="accurate" not in config,
    subset_size=len(images),
    advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
)
onnx.save(quantized, out)
clock.answer(nncf.__version__)
