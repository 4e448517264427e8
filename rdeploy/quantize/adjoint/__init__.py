"""Gradients by ONNX Runtime: backward nodes are written behind a graph's own, one rule an operator. No PyTorch is needed."""
