"""Write a tiny network (two convolutions, a residual, a classifier) for backend tests, plain or with Q/DQ by hand."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 16


class _Graph:
    def __init__(self, scheme):
        self.scheme, self.nodes, self.constants = scheme, [], {}

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_node", **attributes))
        return output

    def constant(self, name, value):
        self.constants[name] = np.asarray(value)
        return name

    def activation(self, source, low, high):
        """Pass a value through a Q/DQ pair for its range, in the scheme's way."""
        if self.scheme is None:
            return source
        if self.scheme.activations == "int8":
            step, zero = max(-low, high) / 127, np.int8(0)
        else:
            step = (high - low) / 255
            zero = np.uint8(round(-low / step))
        name = f"{source}_q{len(self.nodes)}"
        self.constant(f"{name}_scale", np.float32(step))
        self.constant(f"{name}_zero", zero)
        self.node("QuantizeLinear", [source, f"{name}_scale", f"{name}_zero"], name)
        return self.node("DequantizeLinear", [name, f"{name}_scale", f"{name}_zero"], f"{name}_dq")

    def weight(self, name, value):
        if self.scheme is None:
            return self.constant(name, value)
        top = self.scheme.weight_max
        step = np.abs(value).reshape(len(value), -1).max(1) / top
        integers = np.round(value / step.reshape(-1, *[1] * (value.ndim - 1))).clip(-top, top).astype(np.int8)
        self.constant(f"{name}_q", integers)
        self.constant(f"{name}_scale", step.astype(np.float32))
        self.constant(f"{name}_zero", np.zeros(len(value), np.int8))
        return self.node("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], name, axis=0)


def write(path, *, batch=1, channels=16, scheme=None, size=SIZE, opset=18):
    """Write the network: input `x` (batch, 3, size, size), output `y` (batch, 10); a string is a dynamic dimension."""
    rng = np.random.default_rng(0)
    graph = _Graph(scheme)
    first = rng.normal(size=(channels, 3, 3, 3)).astype(np.float32) * 0.2
    second = rng.normal(size=(channels, channels, 3, 3)).astype(np.float32) * (0.5 / channels**0.5)
    classifier = rng.normal(size=(10, channels)).astype(np.float32)
    bias = graph.constant("bias", rng.normal(size=channels).astype(np.float32) * 0.1)
    graph.constant("offset", np.zeros(10, np.float32))

    image = graph.activation("x", -1.0, 1.0)
    graph.node("Conv", [image, graph.weight("first", first), bias], "conv", pads=[1, 1, 1, 1])
    stem = graph.activation(graph.node("Relu", ["conv"], "stem"), 0.0, 4.0)
    branch = graph.node("Conv", [stem, graph.weight("second", second), bias], "branch", pads=[1, 1, 1, 1])
    if scheme is not None and scheme.residual == "all":
        branch = graph.activation(branch, -6.0, 6.0)
    graph.node("Add", [branch, stem], "sum")
    graph.node("Relu", ["sum"], "activated")
    graph.node("GlobalAveragePool", ["activated"], "pooled")
    flat = graph.activation(graph.node("Flatten", ["pooled"], "flat"), 0.0, 3.0)
    graph.node("Gemm", [flat, graph.weight("classifier", classifier), "offset"], "y", transB=1)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def image(batch=1, seed=1):
    """Return random pixels in -1..1, (batch, 3, SIZE, SIZE)."""
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 3, SIZE, SIZE)).astype(np.float32)
