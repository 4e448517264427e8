"""Runs in ONNX Runtime's own environment: `quantize_static`, QDQ, weights per channel.

python run_ort.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG     CONFIG: "u8 min-max", "s8 percentile", ...
"""

import sys

import onnxruntime
from onnxruntime import quantization as ort
from rows import Clock, Rows

source, calibration, out, config = sys.argv[1:5]
STRIDE = 8
METHODS = {
    "min-max": ort.CalibrationMethod.MinMax,
    "percentile": ort.CalibrationMethod.Percentile,
    "entropy": ort.CalibrationMethod.Entropy,
}
kind, method = config.split()
images = Rows(calibration)
name = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).get_inputs()[0].name


class Reader(ort.CalibrationDataReader):
    def __init__(self):
        self.set_range(0, len(images))

    def __len__(self):
        return len(images)

    def set_range(self, start_index, end_index):
        self.rows = iter(range(start_index, end_index))

    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {name: images[row]}


clock = Clock()
prepared = out + ".prepared.onnx"
ort.quant_pre_process(source, prepared, skip_symbolic_shape=True)
signed = kind == "s8"
ort.quantize_static(
    prepared, out, Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True, calibrate_method=METHODS[method],
    activation_type=ort.QuantType.QInt8 if signed else ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
    # in portions: with all images at once it keeps every activation, 10 GB and more
    extra_options={"ActivationSymmetric": signed, **({} if method == "min-max" else {"CalibStridedMinMax": STRIDE})},
)  # fmt: skip
clock.answer(onnxruntime.__version__)
