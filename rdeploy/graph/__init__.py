"""Graph passes on ONNX: simplification, opset conversion, cost. Plain functions over onnx_ir models, in place."""
