"""The operators of ONNX in PyTorch, through which gradients flow: what an INT8 graph and its ranges are judged with."""
